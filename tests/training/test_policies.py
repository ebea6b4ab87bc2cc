"""RandAugment and AutoAugment: torchvision's operations and chances, and for each image a draw of its own."""

import math
from collections import Counter

import pytest
import torch
from torch import Generator, Tensor
from torchvision import transforms
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from coterie.errors import RecipeError
from training.policies import OPERATIONS, AutoAugment, RandAugment, apply_operations

POLICIES = ("imagenet", "cifar10", "svhn")
EVERY = [RandAugment, *(lambda generator, name=name: AutoAugment(generator, policy=name) for name in POLICIES)]
STRAIGHT = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}

# What each operation is for one image, by torchvision's own functions.
ALONE = {
    "ShearX": lambda x, m: F.affine(x, **{**STRAIGHT, "shear": [math.degrees(math.atan(m)), 0.0]}, center=[0, 0]),
    "ShearY": lambda x, m: F.affine(x, **{**STRAIGHT, "shear": [0.0, math.degrees(math.atan(m))]}, center=[0, 0]),
    "TranslateX": lambda x, m: F.affine(x, **{**STRAIGHT, "translate": [int(m * x.shape[2]), 0]}),
    "TranslateY": lambda x, m: F.affine(x, **{**STRAIGHT, "translate": [0, int(m * x.shape[1])]}),
    "Rotate": F.rotate,
    "Brightness": lambda x, m: F.adjust_brightness(x, 1 + m),
    "Color": lambda x, m: F.adjust_saturation(x, 1 + m),
    "Contrast": lambda x, m: F.adjust_contrast(x, 1 + m),
    "Sharpness": lambda x, m: F.adjust_sharpness(x, 1 + m),
    "Posterize": lambda x, m: F.posterize(x, int(m)),
    "Solarize": lambda x, m: F.solarize(x, m / 255),
    "Invert": lambda x, _: F.invert(x),
    "AutoContrast": lambda x, _: F.autocontrast(x),
    "Equalize": lambda x, _: F.equalize(x),
    "Identity": lambda x, _: x,
}
# At these levels no pixel falls exactly between two others, where rounding decides which one is the nearest.
MAGNITUDES = {
    "Posterize": (8, 7, 6, 4),
    "Solarize": (255, 178.5, 127.5, 0),
    "Rotate": (1, -9, 15, -30),
    "TranslateX": (0.02, -0.14, 0.3, -0.45),
    "TranslateY": (0.02, -0.14, 0.3, -0.45),
    "ShearX": (0.01, -0.09, 0.15, -0.3),
    "ShearY": (0.01, -0.09, 0.15, -0.3),
}


def seeded(seed=0):
    return Generator().manual_seed(seed)


def noise(n, height=21, width=34, seed=1):
    return torch.randint(0, 256, (n, 3, height, width), generator=seeded(seed)) / 255


def positions(*names):
    return torch.tensor([OPERATIONS.index(name) for name in names])


@pytest.mark.parametrize("size", [(32, 32), (21, 34), (34, 21)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_makes_of_each_image_what_torchvision_makes_of_it_alone(name, size):
    magnitudes = torch.tensor(MAGNITUDES.get(name, (0.03, -0.27, 0.45, -0.9)))
    images = noise(len(magnitudes), *size)
    changed = apply_operations(images, positions(name).expand(1, len(magnitudes)), magnitudes[None])
    alone = torch.stack([ALONE[name](x, m.item()) for x, m in zip(images, magnitudes, strict=True)])
    torch.testing.assert_close(changed, alone, atol=1e-5, rtol=0)


def test_images_keep_their_place_through_steps_of_mixed_operations():
    draws = torch.stack([torch.randperm(len(OPERATIONS), generator=seeded(seed)) for seed in range(3)])
    magnitudes = torch.tensor([MAGNITUDES.get(name, (0.5,))[-1] for name in OPERATIONS])[draws]
    images = noise(len(OPERATIONS))
    for image, steps, levels, changed in zip(
        images, draws.T, magnitudes.T, apply_operations(images, draws, magnitudes), strict=True
    ):
        for step, level in zip(steps, levels, strict=True):
            image = ALONE[OPERATIONS[step]](image, level.item())
        torch.testing.assert_close(changed, image, atol=1e-4, rtol=0)


def outcomes(policy, image) -> Tensor:
    """Everything a policy draws for this image."""
    operations, magnitudes = policy.draw(20_000)
    n_steps = len(operations)
    drawn = torch.cat([operations.to(magnitudes.dtype), magnitudes]).unique(dim=1)
    return apply_operations(image.expand(drawn.shape[1], -1, -1, -1), drawn[:n_steps].long(), drawn[n_steps:])


def strangers(images, known, *, share) -> int:
    """How many images differ from each of the known ones by more than this share of pixels."""
    return sum(bool(((known - x).abs() > 1e-4).any(1).float().mean((1, 2)).min() > share) for x in images)


def drawn_by_torchvision(transform, image, n):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.stack([transform(image) for _ in range(n)])


@pytest.mark.parametrize("magnitude", [9, 30])
def test_randaugment_and_torchvisions_transform_make_the_same_images(magnitude):
    image = noise(1)[0]
    ours = outcomes(RandAugment(seeded(), n_ops=1, magnitude=magnitude), image)
    theirs = drawn_by_torchvision(v2.RandAugment(num_ops=1, magnitude=magnitude), image, 400)
    assert strangers(theirs, ours, share=0) == 0
    assert strangers(ours, theirs, share=0) == 0


@pytest.mark.parametrize("name", POLICIES)
def test_whatever_torchvisions_autoaugment_makes_ours_makes_too(name):
    image = noise(1)[0]
    ours = outcomes(AutoAugment(seeded(), policy=name), image)
    theirs = drawn_by_torchvision(v2.AutoAugment(v2.AutoAugmentPolicy(name)), image, 200)
    # A shear by 1/5 or 1/15 puts whole rows exactly between pixels.
    assert strangers(theirs, ours, share=0.05) == 0


def test_randaugments_strongest_magnitudes_are_those_known_of_torchvision():
    operations, magnitudes = RandAugment(seeded(), magnitude=30).draw(2_000)
    drawn = {
        (OPERATIONS[o], round(m, 4)) for o, m in zip(operations.flatten(), magnitudes.flatten().tolist(), strict=True)
    }
    signed = {"ShearX": 0.3, "ShearY": 0.3, "TranslateX": 150 / 331, "TranslateY": 150 / 331, "Rotate": 30.0}
    signed |= dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), 0.9)
    plain = {"Posterize": 4, "Solarize": 0, "AutoContrast": 0, "Equalize": 0, "Identity": 0}
    assert drawn == {(name, sign * round(m, 4)) for name, m in signed.items() for sign in (1, -1)} | set(plain.items())


def test_randaugment_draws_every_operation_alike_for_each_image_and_step():
    n = 40_000
    operations, magnitudes = RandAugment(seeded(), n_ops=3).draw(n)
    for step in operations:
        shares = Counter(OPERATIONS[o] for o in step)
        assert set(shares) == set(OPERATIONS) - {"Invert"}
        # Five standard deviations of a share of 1/14.
        assert all(abs(count / n - 1 / 14) < 5 * math.sqrt(1 / 14 * 13 / 14 / n) for count in shares.values())
    rotated = magnitudes[operations == OPERATIONS.index("Rotate")]
    assert abs((rotated > 0).float().mean() - 0.5) < 5 * math.sqrt(0.25 / len(rotated))


@pytest.mark.parametrize("name", POLICIES)
def test_autoaugment_draws_operations_by_the_policys_probabilities(name):
    n = 40_000
    pairs = transforms.AutoAugment(transforms.AutoAugmentPolicy(name)).policies
    operations, _ = AutoAugment(seeded(), policy=name).draw(n)
    for step, row in enumerate(operations):
        expected = Counter()
        for pair in pairs:
            operation, probability, _ = pair[step]
            expected[operation] += probability / len(pairs)
        shares = Counter(OPERATIONS[o] for o in row)
        assert set(shares) == {operation for operation, share in expected.items() if share} | {"Identity"}
        assert all(abs(shares[o] / n - share) < 5 * math.sqrt(0.25 / n) for o, share in expected.items())


def test_the_two_operations_of_an_image_are_one_pair_of_the_policy():
    pairs = transforms.AutoAugment(transforms.AutoAugmentPolicy("cifar10")).policies
    operations, _ = AutoAugment(seeded(), policy="cifar10").draw(5_000)
    both = {(OPERATIONS[a], OPERATIONS[b]) for a, b in operations.T if "Identity" not in (OPERATIONS[a], OPERATIONS[b])}
    assert both <= {(first, second) for (first, *_), (second, *_) in pairs}


@pytest.mark.parametrize("policy", EVERY)
def test_equal_images_of_a_batch_become_different(policy):
    changed = policy(seeded())(noise(1).expand(64, -1, -1, -1))
    assert len(changed.unique(dim=0)) > 15


@pytest.mark.parametrize("policy", EVERY)
def test_the_generator_alone_decides(policy):
    images, before = noise(16), torch.get_rng_state()
    generator = seeded(3)
    state, augment = generator.get_state(), policy(generator)
    first, second = augment(images), augment(images)
    generator.set_state(state)
    assert torch.equal(augment(images), first)
    assert not torch.equal(second, first)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("policy", EVERY)
def test_images_keep_shape_type_and_range_and_the_given_ones_stay(policy, dtype):
    images = noise(256, 9, 14).to(dtype)
    given = images.clone()
    changed = policy(seeded())(images)
    assert (changed.shape, changed.dtype) == (images.shape, dtype)
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert torch.equal(images, given)


@pytest.mark.parametrize("policy", EVERY)
def test_grey_stays_grey_even_where_all_pixels_are_equal(policy):
    grey = torch.cat([noise(128)[:, :1], torch.linspace(0, 1, 128).view(-1, 1, 1, 1).expand(-1, -1, 21, 34)])
    changed = policy(seeded())(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(changed, changed[:, :1].expand_as(changed), atol=1e-3, rtol=0)


@pytest.mark.parametrize("policy", EVERY)
@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (50, 3, 1, 1), (50, 3, 2, 5), (0, 3, 8, 8)])
def test_single_tiny_and_no_images_pass(policy, shape):
    augment = policy(seeded())
    for _ in range(10):
        assert augment(torch.full(shape, 0.25)).shape == shape


def test_no_operations_leave_the_images_alone():
    images = noise(4)
    assert torch.equal(RandAugment(seeded(), n_ops=0)(images), images)


@pytest.mark.parametrize("magnitude", [-1, 31])
def test_a_magnitude_out_of_range_is_refused_with_the_range(magnitude):
    with pytest.raises(RecipeError, match=f"no magnitude {magnitude}; choose 0 to 30"):
        RandAugment(seeded(), magnitude=magnitude)


def test_an_unknown_policy_is_refused_with_the_known_ones():
    with pytest.raises(RecipeError, match="no policy 'mnist'; choose imagenet, cifar10, svhn"):
        AutoAugment(seeded(), policy="mnist")
