"""What a pretrained encoder brings: timm's own pixels, all of its weights, and where they are from."""

import hashlib

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_image
from timm.data import create_transform, resolve_model_data_config

from coterie.errors import RecipeError
from coterie.images import Preprocessing, fit
from export.source import pretrained_source, run_source
from training.encoders import EncoderSpec, build_encoder


@pytest.fixture(scope="module")
def source(tiny_weights):
    return pretrained_source("timm:test_resnet", weights=tiny_weights)


def test_the_pixels_are_those_that_timm_evaluates_on(source):
    model = timm.create_model("test_resnet")
    transform = create_transform(**resolve_model_data_config(model), is_training=False, normalize=False)
    photo = Image.fromarray(load_sample_image("flower.jpg"))  # 427 × 640
    theirs = transform(photo).permute(1, 2, 0).numpy().astype(int)

    def difference(**changes):
        ours = fit(photo, source.spec.preprocessing.model_copy(update=changes))
        return np.abs(ours - theirs).mean()

    # timm rounds before it crops, so its grid lies a fraction of a pixel beside ours: equal they are not.
    assert difference() < 4  # of 255
    assert difference() < min(
        difference(crop_fraction=0.93),
        difference(crop_fraction=0.97),
        difference(interpolation="bicubic"),
        difference(resize="stretch"),
    )


def test_normalisation_is_timms(source):
    assert source.spec.mean == source.spec.std == (0.5, 0.5, 0.5)
    assert source.encoder.mean.flatten().tolist() == [0.5, 0.5, 0.5]


def test_the_weights_are_those_of_the_file(source, tiny_weights):
    weights = load_file(tiny_weights)
    found = source.encoder.backbone.state_dict()
    assert found and all(torch.equal(found[name], weights[name]) for name in found)
    assert not source.encoder.training
    assert source.provenance["weights"] == "sha256:" + hashlib.sha256(tiny_weights.read_bytes()).hexdigest()


def test_weights_of_the_hub_are_named_with_their_licence(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **options: create(name, **options))
    source = pretrained_source("timm:test_resnet")
    assert source.provenance["weights"] == "timm/test_resnet.r160_in1k"
    assert source.provenance["license"] == "apache-2.0"


def test_a_hub_out_of_reach_is_answered_with_the_way_around_it(monkeypatch):
    create = timm.create_model

    def unreachable(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no route to the hub")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(RecipeError, match=r"timm:test_resnet .*no route to the hub.* give the file with --weights"):
        pretrained_source("timm:test_resnet")


@pytest.mark.parametrize("stem", ["small", "large"])
def test_the_weights_decide_the_stem_of_a_resnet(stem, tmp_path):
    spec = EncoderSpec("resnet18", 0, (0.0,) * 3, (1.0,) * 3, Preprocessing(input_size=(32, 32)), stem=stem)
    save_file(build_encoder(spec).backbone.state_dict(), tmp_path / "weights.safetensors")
    source = pretrained_source("resnet18", weights=tmp_path / "weights.safetensors", input_size=32)
    assert source.spec.stem == stem


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:test_resnot", "timm has no model 'test_resnot'; near it: .*test_resnet"),
        ("timm:test_resnet.nope", "there are test_resnet.r160_in1k"),
        ("convnext_atto", "no encoder 'convnext_atto': use .* timm:NAME"),
        ("cifar_resnet20", "train it, and export the run"),
    ],
)
def test_names_that_nothing_is_known_by(name, message):
    with pytest.raises(RecipeError, match=message):
        pretrained_source(name)


def test_weights_of_another_encoder_are_refused(tiny_weights):
    with pytest.raises(RecipeError, match=r"--weights: file .* does not fit timm:test_vit") as refused:
        pretrained_source("timm:test_vit", weights=tiny_weights)
    assert "encoder.start" not in str(refused.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"--weights .*random: no such file"):
        pretrained_source("timm:test_resnet", weights=tmp_path / "random")


def test_a_run_knows_what_it_has_seen(tiny_run):
    source = run_source(tiny_run)
    assert source.seen == tiny_run.dataset()
    assert source.whitened
