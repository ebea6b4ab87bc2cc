"""Augmentation: what stays, what changes, and what each image gets for itself."""

import pytest
import torch
from torch import Generator

from training.augment import Augment
from training.sections import AugmentSection

NOTHING = {
    "crop_area": (1.0, 1.0),
    "crop_ratio": (1.0, 1.0),
    "flip": 0,
    "rotate": 0,
    "shear": 0,
    "jitter": 0,
    "grey": 0,
    "blur": 0,
}


def augment(images, size=None, seed=0, **changes):
    generator = Generator().manual_seed(seed)
    config = AugmentSection(**{**NOTHING, **changes})
    return Augment(config, size or tuple(images.shape[1:3]), generator)(images)


@pytest.fixture
def images():
    return torch.randint(0, 256, (6, 12, 16, 3), dtype=torch.uint8, generator=Generator().manual_seed(1))


def plain(images):
    return images.permute(0, 3, 1, 2).float() / 255


def test_with_everything_off_only_the_layout_and_scale_change(images):
    torch.testing.assert_close(augment(images), plain(images), atol=1e-5, rtol=0)


def test_a_certain_flip_mirrors_left_and_right(images):
    torch.testing.assert_close(augment(images, flip=1), plain(images).flip(3), atol=1e-5, rtol=0)


def test_a_full_turn_of_half_a_circle_mirrors_both_axes(images):
    # rotate draws from ±180°; a generator whose draw is pinned to the end gives exactly 180°.
    class Pinned(Augment):
        def _uniform(self, n, low, high):
            return torch.full((n,), high)

    turned = Pinned(AugmentSection(**{**NOTHING, "rotate": 180}), (12, 16), Generator())(images)
    torch.testing.assert_close(turned, plain(images).flip(2, 3), atol=1e-4, rtol=0)


def test_views_have_the_size_asked_for_and_stay_within_range(images):
    views = augment(
        images, size=(8, 8), crop_area=(0.2, 1.0), flip=0.5, rotate=20, shear=10, jitter=1, grey=0.5, blur=0.5
    )
    assert views.shape == (6, 3, 8, 8)
    assert views.min() >= 0
    assert views.max() <= 1


def test_equal_images_of_a_batch_get_different_views():
    same = torch.randint(0, 256, (1, 16, 16, 3), dtype=torch.uint8).expand(8, -1, -1, -1)
    views = augment(same, crop_area=(0.3, 1.0), jitter=1)
    distances = torch.pdist(views.flatten(1))
    assert distances.min() > 0


def test_the_generator_decides_everything(images):
    settings = {"crop_area": (0.3, 1.0), "flip": 0.5, "jitter": 0.8, "grey": 0.2, "blur": 0.5}
    assert torch.equal(augment(images, seed=3, **settings), augment(images, seed=3, **settings))
    assert not torch.equal(augment(images, seed=3, **settings), augment(images, seed=4, **settings))


def test_grey_makes_the_channels_equal(images):
    views = augment(images, grey=1)
    torch.testing.assert_close(views[:, 0], views[:, 1])
    torch.testing.assert_close(views[:, 0], views[:, 2])


def test_hue_leaves_luma_alone(images):
    # Values near the middle, so that the rotation is not clipped.
    soft = (images // 8 + 112).to(torch.uint8)
    jittered = augment(soft, jitter=1, brightness=0, contrast=0, saturation=0, hue=0.5)
    luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    torch.testing.assert_close((jittered * luma).sum(1), (plain(soft) * luma).sum(1), atol=2e-3, rtol=0)
    assert (jittered - plain(soft)).abs().max() > 0.01


def test_blur_keeps_a_flat_image_and_calms_a_noisy_one(images):
    flat = torch.full((2, 16, 16, 3), 77, dtype=torch.uint8)
    torch.testing.assert_close(augment(flat, blur=1), plain(flat), atol=1e-5, rtol=0)
    assert augment(images, blur=1).var() < plain(images).var()
