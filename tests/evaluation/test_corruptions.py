"""The corruptions do what their names say, by seed and severity, at any size."""

import numpy as np
import pytest
from scipy import ndimage

from evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from evaluation.corruptions.blur import smeared, zoomed


@pytest.fixture(scope="module")
def images():
    """Smooth scenes with edges: what blur, noise and compression all change."""
    rng = np.random.default_rng(0)
    scenes = ndimage.zoom(rng.uniform(30, 225, size=(6, 8, 8, 3)), (1, 4, 4, 1), order=1)
    scenes[:, 8:20, 10:24] = rng.uniform(0, 255, size=(6, 1, 1, 3))
    return scenes.astype(np.uint8)


def change(images, name, severity):
    found = [corrupt(image, name, severity, seed=0, index=i) for i, image in enumerate(images)]
    return np.abs(np.stack(found).astype(float) - images).mean()


def test_there_are_fifteen_at_five_severities():
    assert len(CORRUPTIONS) == 15
    assert SEVERITIES == (1, 2, 3, 4, 5)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_seed_index_and_severity_decide(images, name):
    first = corrupt(images[0], name, 3, seed=0, index=0)
    assert first.dtype == np.uint8
    assert first.shape == images[0].shape
    np.testing.assert_array_equal(first, corrupt(images[0].copy(), name, 3, seed=0, index=0))
    assert not np.array_equal(first, images[0])


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "motion_blur", "snow"])
def test_what_is_random_differs_between_images_and_seeds(images, name):
    first = corrupt(images[0], name, 3, seed=0, index=0)
    assert not np.array_equal(first, corrupt(images[0], name, 3, seed=1, index=0))
    assert not np.array_equal(first, corrupt(images[0], name, 3, seed=0, index=1))


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - {"elastic_transform"}))
def test_the_severest_changes_more_than_the_mildest(images, name):
    """Elastic's published constants trade the affine map against the field, and are not in order."""
    assert change(images, name, 5) > change(images, name, 1)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(24, 40, 3), (16, 16, 3), (33, 65, 3)])
def test_other_sizes_and_plain_images_do(name, shape):
    for value in (0, 255):
        for severity in (1, 5):
            found = corrupt(np.full(shape, value, dtype=np.uint8), name, severity, seed=0, index=0)
            assert found.shape == shape


def test_noise_has_the_published_strength():
    grey = np.full((256, 256, 3), 128, dtype=np.uint8)
    for severity, deviation in zip(SEVERITIES, (0.04, 0.06, 0.08, 0.09, 0.10), strict=True):
        found = corrupt(grey, "gaussian_noise", severity, seed=0, index=0) / 255
        assert found.std() == pytest.approx(deviation, rel=0.01)
        hit = corrupt(grey, "impulse_noise", severity, seed=0, index=0)
        assert np.isin(hit, (0, 255)).mean() == pytest.approx((0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1], rel=0.05)
    shot = corrupt(grey, "shot_noise", 5, seed=0, index=0) / 255
    assert shot.std() == pytest.approx(np.sqrt(128 / 255 / 50), rel=0.01)


def test_contrast_and_brightness_follow_their_formulas(images):
    x = images[0] / 255
    means = x.mean(axis=(0, 1))
    expected = np.clip((x - means) * 0.15 + means, 0, 1) * 255
    np.testing.assert_allclose(corrupt(images[0], "contrast", 5, seed=0, index=0), expected, atol=1)
    import colorsys

    lighter = corrupt(images[0], "brightness", 5, seed=0, index=0) / 255
    for row, column in ((0, 0), (10, 12), (31, 31)):
        hue, saturation, value = colorsys.rgb_to_hsv(*x[row, column])
        expected = colorsys.hsv_to_rgb(hue, saturation, min(value + 0.3, 1))
        np.testing.assert_allclose(lighter[row, column], expected, atol=1 / 255)


def test_blur_keeps_the_mean_and_lessens_detail(images):
    for name in ("defocus_blur", "motion_blur", "zoom_blur"):
        found = corrupt(images[0], name, 5, seed=0, index=0).astype(float)
        assert np.abs(np.diff(found, axis=0)).mean() < np.abs(np.diff(images[0].astype(float), axis=0)).mean()


def test_a_smear_along_the_row_is_a_one_sided_normal_kernel():
    point = np.zeros((9, 15, 1))
    point[4, 10] = 1
    found = smeared(point, 6, 2.0, angle=0)
    steps = np.arange(13)
    weights = np.exp(-(steps**2) / 8) / np.exp(-(steps**2) / 8).sum()
    np.testing.assert_allclose(found[4, 10 - np.arange(11), 0], weights[:11], atol=1e-12)
    assert found[:4].sum() == found[5:].sum() == 0


def test_zooming_is_scipys_of_the_middle():
    image = np.random.default_rng(1).uniform(size=(32, 32, 3))
    kept = int(np.ceil(32 / 1.2))
    first = (32 - kept) // 2
    slow = ndimage.zoom(image[first : first + kept, first : first + kept], (1.2, 1.2, 1), order=1)
    trimmed = (len(slow) - 32) // 2
    np.testing.assert_allclose(zoomed(image, 1.2), slow[trimmed : trimmed + 32, trimmed : trimmed + 32], atol=1e-9)
    np.testing.assert_array_equal(zoomed(image, 1.0), image)
