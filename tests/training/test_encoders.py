"""Encoders: architectures, stems, sizes, heads; on small images, and the deep ones without memory."""

import pytest
import torch
from torch import nn

from coterie.errors import RecipeError
from coterie.images import Preprocessing
from training.encoders import EncoderSpec, build_encoder, encoder_warnings, projection_head

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


def spec_of(name, size=32, **changes):
    size = size if isinstance(size, tuple) else (size, size)
    return EncoderSpec(name, 8, MEAN, STD, Preprocessing(input_size=size), **changes)


def stages(encoder, side):
    """Height of the last feature map before pooling."""
    heights = []
    encoder.backbone.layer4.register_forward_hook(lambda module, args, out: heights.append(out.shape[2]))
    with torch.no_grad():
        encoder.eval()(torch.zeros(1, 3, side, side))
    return heights[0]


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


# Architectures


@pytest.mark.parametrize(
    ("name", "count"),
    [  # He et al.'s networks without the classifier (torchvision's published counts less 1000 · (dim + 1))
        ("resnet18", 11_689_512 - 513_000),
        ("resnet34", 21_797_672 - 513_000),
        ("resnet50", 25_557_032 - 2_049_000),
        ("resnet101", 44_549_160 - 2_049_000),
        ("resnet152", 60_192_808 - 2_049_000),
    ],
)
def test_resnets_have_the_papers_parameters(name, count):
    with torch.device("meta"):
        large, small = (build_encoder(spec_of(name, 224, stem=stem)) for stem in ("large", "small"))
    assert parameters(large) == count
    assert parameters(small) == count - 64 * 3 * (7 * 7 - 3 * 3)  # only the first convolution is smaller
    assert large.dim == (512 if name in ("resnet18", "resnet34") else 2048)


def test_resnet200_has_200_layers():
    with torch.device("meta"):
        backbone = build_encoder(spec_of("resnet200")).backbone
    assert [len(getattr(backbone, f"layer{stage}")) for stage in (1, 2, 3, 4)] == [3, 24, 36, 3]
    convolutions = sum(isinstance(module, nn.Conv2d) for module in backbone.modules())
    assert convolutions - 4 + 1 == 200  # without the projections of four shortcuts, with the classifier of its name


def test_each_block_starts_as_the_identity():
    for name, last in (("resnet18", "bn2"), ("resnet50", "bn3")):
        blocks = [
            block for stage in (1, 2, 3, 4) for block in getattr(build_encoder(spec_of(name)).backbone, f"layer{stage}")
        ]
        assert all(not getattr(block, last).weight.any() for block in blocks)


@pytest.mark.parametrize("name", ["cifar_resnet9", "cifar_resnet2", "cifar_resnet", "resnet51", "vgg", "timm:vgg99"])
def test_unknown_architectures_are_refused_by_name(name):
    with pytest.raises(RecipeError, match=name.removeprefix("timm:")):
        spec_of(name)


def test_unknown_weights_of_a_timm_model_are_refused_with_those_there_are():
    with pytest.raises(RecipeError, match=r"resnet18\.a1_in1k"):
        spec_of("timm:resnet18.mine")


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "cifar_resnet8", "timm:mobilenetv3_small_050"])
def test_gradients_reach_the_first_layer_and_channels_last_changes_nothing(name):
    torch.manual_seed(0)
    encoder = build_encoder(spec_of(name))
    images = torch.rand(4, 3, 32, 32)
    features = encoder(images)
    assert features.shape == (4, encoder.dim)
    # A sum over BatchNorm's channels would have no gradient.
    (features * torch.randn_like(features)).sum().backward()
    first = next(module for module in encoder.modules() if isinstance(module, nn.Conv2d))
    assert first.weight.grad.abs().max() > 0
    encoder.eval()
    with torch.no_grad():
        rows_first = encoder(images)
        encoder.to(memory_format=torch.channels_last)
        channels_last = encoder(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(channels_last, rows_first, rtol=1e-4, atol=1e-5)


# Stems


@pytest.mark.parametrize("name", ["resnet18", "timm:resnet18", "timm:resnet18d", "timm:resnetblur18"])
def test_the_stem_decides_the_size_of_the_features(name):
    assert stages(build_encoder(spec_of(name, stem="large")), 32) == 1
    assert stages(build_encoder(spec_of(name, stem="small")), 32) == 4


@pytest.mark.parametrize(
    ("name", "size", "stem"),
    [
        ("resnet18", 64, "small"),
        ("resnet18", 65, "large"),
        ("resnet18", (32, 200), "small"),
        ("timm:seresnet50", 32, "small"),
        ("timm:resnet50", 224, "large"),
        ("timm:convnext_atto", 32, "large"),
        ("cifar_resnet20", 224, "small"),
    ],
)
def test_auto_picks_the_stem_by_the_shorter_side_and_is_resolved_in_the_spec(name, size, stem):
    spec = spec_of(name, size)
    assert spec.stem == spec.to_json()["stem"] == stem


@pytest.mark.parametrize(
    ("name", "stem"),
    [("timm:convnext_atto", "small"), ("timm:vit_tiny_patch16_224", "small"), ("cifar_resnet8", "large")],
)
def test_a_stem_that_the_architecture_does_not_have_is_refused(name, stem):
    with pytest.raises(RecipeError, match=f"no {stem} stem"):
        spec_of(name, stem=stem)


def test_a_stem_that_does_not_suit_the_images_is_warned_about():
    (warning,) = encoder_warnings(spec_of("resnet50", 32, stem="large"))
    assert "1×1 features of 32×32 images" in warning
    assert "small makes 4×4" in warning
    (warning,) = encoder_warnings(spec_of("timm:resnet50", (224, 192), stem="small"))
    assert "28×24 features of 224×192 images" in warning
    assert "large makes 7×6" in warning
    (warning,) = encoder_warnings(spec_of("cifar_resnet20", 224))
    assert "56×56" in warning


@pytest.mark.parametrize("size", [8, 32, 64, 65, 96, 97, 224, (32, 300)])
def test_auto_is_never_warned_about(size):
    assert encoder_warnings(spec_of("resnet18", size)) == []


# Models that take one size


def test_a_vision_transformer_is_built_for_the_recipes_images():
    spec = spec_of("timm:vit_tiny_patch16_224", (64, 32))
    encoder = build_encoder(spec).eval()
    assert encoder(torch.zeros(1, 3, 64, 32)).shape == (1, encoder.dim) == (1, 192)
    (warning,) = encoder_warnings(spec)
    assert "224×224" in warning
    assert "64×32" in warning
    assert encoder_warnings(spec_of("timm:vit_tiny_patch16_224", 224)) == []
    assert encoder_warnings(spec_of("timm:convnext_atto", 32)) == []


@pytest.mark.parametrize(("name", "size"), [("timm:vit_tiny_patch16_224", 8), ("timm:levit_128s", 100)])
def test_images_that_a_model_cannot_take_are_refused_with_a_size_that_it_can(name, size):
    with pytest.raises(RecipeError, match=rf"{size}×{size} .*input_size to \[224, 224\]"):
        build_encoder(spec_of(name, size))


# Projection heads


def test_heads_have_as_many_layers_as_asked_for():
    def shape(*args):
        return [tuple(layer.weight.shape) for layer in projection_head(64, 16, *args) if isinstance(layer, nn.Linear)]

    assert shape(1) == [(16, 64)]
    assert shape() == shape(2) == [(64, 64), (16, 64)]
    assert shape(3, 32) == [(32, 64), (32, 32), (16, 32)]
    kinds = [type(layer) for layer in projection_head(64, 16, 3)]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2 + [nn.Linear]


def test_heads_that_cannot_be_are_refused():
    with pytest.raises(RecipeError, match="at least 1"):
        projection_head(64, 16, 0)
    with pytest.raises(RecipeError, match="no hidden width"):
        projection_head(64, 16, 1, 32)
