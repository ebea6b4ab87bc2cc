"""Start weights: files by others' names, runs, timm's hub; all of a backbone or nothing."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from coterie.errors import RecipeError
from coterie.images import Preprocessing
from training.encoders import EncoderSpec, build_encoder
from training.run import Run
from training.start import Normalisation, load_start

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


def spec_of(name, size=32, **changes):
    return EncoderSpec(name, 8, MEAN, STD, Preprocessing(input_size=(size, size)), **changes)


def same(left, right):
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture(scope="module")
def trained():
    """A ResNet-18 of the small stem with a classifier, all of whose weights differ from a new one's."""
    torch.manual_seed(1)
    model = build_encoder(spec_of("resnet18")).backbone
    model.reset_classifier(5)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.5)
    return model


def backbone_of(trained):
    return {name: tensor for name, tensor in trained.state_dict().items() if not name.startswith("fc.")}


def load(start, spec=None):
    spec = spec or spec_of("resnet18")
    encoder = build_encoder(spec)
    return encoder, load_start(encoder, spec, str(start))


def holds(encoder, trained):
    wanted = backbone_of(trained)
    found = encoder.backbone.state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_random_leaves_the_weights_as_they_were_built():
    torch.manual_seed(0)
    untouched = build_encoder(spec_of("cifar_resnet8"))
    torch.manual_seed(0)
    encoder, normalisation = load("random", spec_of("cifar_resnet8"))
    assert same(encoder, untouched)
    assert normalisation is None


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.encoder.", "encoder.module."])
def test_a_file_loads_under_the_prefixes_that_training_leaves_behind(prefix, trained, tmp_path):
    save_file({prefix + name: tensor for name, tensor in trained.state_dict().items()}, tmp_path / "w.safetensors")
    encoder, normalisation = load(tmp_path / "w.safetensors")
    assert holds(encoder, trained)
    assert normalisation is None


@pytest.mark.parametrize("wrapper", ["state_dict", "model", None])
@pytest.mark.parametrize("suffix", ["pt", "pth"])
def test_checkpoints_are_unwrapped(wrapper, suffix, trained, tmp_path):
    weights = trained.state_dict()
    torch.save({wrapper: weights, "epoch": 7} if wrapper else weights, tmp_path / f"w.{suffix}")
    assert holds(load(tmp_path / f"w.{suffix}")[0], trained)


def test_only_classifiers_that_the_backbone_lacks_are_dropped(tmp_path):
    model = timm.create_model("convnext_atto", num_classes=3)  # its last norm is named head.norm
    nn.init.constant_(model.head.norm.weight, 0.25)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    encoder, _ = load(tmp_path / "w.safetensors", spec_of("timm:convnext_atto"))
    assert encoder.backbone.head.norm.weight.eq(0.25).all()


def test_files_without_batch_norms_counters_load(trained, tmp_path):
    weights = {name: tensor for name, tensor in trained.state_dict().items() if "num_batches" not in name}
    save_file(weights, tmp_path / "w.safetensors")
    encoder, _ = load(tmp_path / "w.safetensors")
    assert torch.equal(encoder.backbone.bn1.running_mean, trained.bn1.running_mean)


def test_a_part_is_never_loaded(trained, tmp_path):
    weights = backbone_of(trained)
    del weights["layer2.0.conv1.weight"]
    weights["bn1.bias"] = torch.zeros(3)
    save_file(weights, tmp_path / "part.safetensors")
    # 20 convolutions and 20 BatchNorms of four tensors each.
    expected = r"98 of 100 weights match; no layer2\.0\.conv1\.weight; bn1\.bias is 3, not 64"
    encoder = build_encoder(spec_of("resnet18"))
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with pytest.raises(RecipeError, match=expected):
        load_start(encoder, spec_of("resnet18"), str(tmp_path / "part.safetensors"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_a_deeper_network_whose_first_blocks_would_fit_is_refused(tmp_path):
    # Every tensor of ResNet-18 has its like in ResNet-34.
    save_file(build_encoder(spec_of("resnet34")).backbone.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(RecipeError, match=r"100 of 100 weights match; layer1\.2\.\S+ has no place; .* more"):
        load(tmp_path / "w.safetensors")


def test_weights_of_the_other_stem_are_refused_with_the_remedy(trained, tmp_path):
    save_file(backbone_of(trained), tmp_path / "small.safetensors")
    save_file(timm.create_model("resnet18").state_dict(), tmp_path / "large.safetensors")
    with pytest.raises(RecipeError, match=r"64×3×7×7, not 64×3×3×3; set encoder\.stem=large"):
        load(tmp_path / "large.safetensors")
    with pytest.raises(RecipeError, match=r"64×3×3×3, not 64×3×7×7; set encoder\.stem=small"):
        load(tmp_path / "small.safetensors", spec_of("resnet18", stem="large"))
    load(tmp_path / "large.safetensors", spec_of("resnet18", stem="large"))


def test_two_networks_in_one_file_are_refused(trained, tmp_path):
    weights = trained.state_dict()
    twice = {prefix + name: tensor.clone() for prefix in ("encoder.", "") for name, tensor in weights.items()}
    save_file(twice, tmp_path / "w.safetensors")
    with pytest.raises(RecipeError, match="two weights "):
        load(tmp_path / "w.safetensors")


class Settings:
    """An object as some training scripts pickle beside their weights."""


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("w.pt", Settings(), "objects beside tensors"),
        ("w.pth", {"epoch": 3}, "no weights by name"),
        ("w.pt", [torch.zeros(1)], "no weights by name"),
        ("w.pt", b"not weights", r"w\.pt"),
        ("w.safetensors", b"not weights", "cannot be read"),
        ("w.onnx", b"", r"\.safetensors, \.pt and \.pth"),
        (None, None, "no such run or file"),
    ],
)
def test_files_that_hold_no_weights_are_one_clear_error(name, content, expected, tmp_path):
    file = tmp_path / (name or "missing.pt")
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif name:
        torch.save(content, file)
    with pytest.raises(RecipeError, match=expected) as caught:
        load(file)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run as far as start weights need it: an encoder that has been whitened."""
    spec = spec_of("cifar_resnet8", 16)
    encoder = build_encoder(spec)
    encoder.whiten(torch.randn(64, encoder.dim), torch.arange(64) % 4, shrinkage=0.1)
    run = Run(tmp_path_factory.mktemp("run"))
    run.save_encoder(encoder, spec)
    (run.path / "recipe.yaml").write_text("name: finished\n")
    return run


def test_a_run_gives_its_backbone_and_normalisation_but_not_its_whitening(finished):
    source, spec = finished.load_encoder()
    encoder = build_encoder(spec)
    encoder.whitener.fill_(3)
    assert load_start(encoder, spec, str(finished.path)) == Normalisation(MEAN, STD)
    assert same(encoder.backbone, source.backbone)
    assert not encoder.centre.any()
    assert torch.equal(encoder.whitener, torch.eye(encoder.dim))
    assert not torch.equal(source.whitener, encoder.whitener)


def test_the_weights_file_of_a_run_is_a_file_like_others(finished):
    source, spec = finished.load_encoder()
    encoder, _ = load(finished.path / "encoder.safetensors", spec)
    assert "whitener" in load_file(finished.path / "encoder.safetensors")
    assert same(encoder.backbone, source.backbone)


def test_a_run_of_another_architecture_is_refused_with_both_names(finished):
    with pytest.raises(RecipeError, match=r"cifar_resnet8 of width 8\) does not fit cifar_resnet14 of width 8"):
        load(finished.path, spec_of("cifar_resnet14"))
    with pytest.raises(RecipeError, match="does not fit resnet18 with the small stem"):
        load(finished.path)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="is not a run"):
        load(tmp_path)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Stands in for timm's hub: serves the file it returns, through timm's own loading."""
    create, file = timm.create_model, tmp_path / "hub.safetensors"
    overlay = {"file": str(file), "custom_load": False}  # a plain file, not Google's arrays

    def local(name, *, pretrained, **options):
        return create(name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **options)

    monkeypatch.setattr(timm, "create_model", local)
    return file


@pytest.mark.parametrize("name", ["resnet18", "timm:resnet18"])
def test_pretrained_takes_timms_weights_and_tells_their_normalisation(name, hub):
    torch.manual_seed(2)
    model = timm.models.resnet18()
    save_file(model.state_dict(), hub)
    encoder, normalisation = load("pretrained", spec_of(name, stem="large"))
    assert holds(encoder, model)
    assert normalisation == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with pytest.raises(RecipeError, match=r"timm's weights of .* set encoder\.stem=large"):
        load("pretrained", spec_of(name, stem="small"))


def test_pretrained_position_embeddings_are_resampled_to_the_recipes_images(hub):
    model = timm.models.vit_tiny_patch16_224()
    save_file(model.state_dict(), hub)
    encoder, normalisation = load("pretrained", spec_of("timm:vit_tiny_patch16_224", 32))
    assert encoder.backbone.pos_embed.shape == (1, 1 + 2 * 2, 192)
    assert torch.equal(encoder.backbone.cls_token, model.cls_token)
    assert normalisation == ((0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("name", ["cifar_resnet8", "resnet200"])
def test_architectures_without_pretrained_weights_say_so(name):
    with torch.device("meta"):
        encoder = build_encoder(spec_of(name))
        with pytest.raises(RecipeError, match=rf"no weights of {name}"):
            load_start(encoder, spec_of(name), "pretrained")
