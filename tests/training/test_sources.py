"""Pixels from memory and from files are the same pixels."""

import numpy as np
import pytest
import torch

from coterie.dataset import read_images, read_pixels
from coterie.errors import DataError
from coterie.images import Preprocessing
from training.sources import MemoryImages, StreamedImages, fits_in_memory

FORM = Preprocessing(input_size=(16, 16), resize="stretch", interpolation="bicubic", background=(0, 0, 0))
CPU = torch.device("cpu")


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_pixels_are_those_in_memory(tiny_run_tree, workers):
    found = read_images(tiny_run_tree)
    images = read_pixels(found, FORM)
    streamed = StreamedImages(found, images.rows, FORM, CPU, workers)
    memory = MemoryImages(torch.from_numpy(images.pixels))
    for seed in (0, 1):  # the workers live on from one pass to the next
        rows = torch.from_numpy(np.random.default_rng(seed).permutation(len(images))[:50]).split(20)
        pairs = list(zip(streamed.batches(rows), memory.batches(rows), strict=True))
        assert [len(pixels) for pixels, _ in pairs] == [20, 20, 10]
        assert all(torch.equal(pixels, expected) for pixels, expected in pairs)


def test_rows_that_were_left_out_do_not_shift_the_others(digit_tree):
    broken = sorted((digit_tree / "0").iterdir())[1]
    broken.write_bytes(b"no image")
    found = read_images(digit_tree)
    images = read_pixels(found, FORM, keep_pixels=False)
    assert len(images.pixels) == 0
    assert len(images) == len(found) - 1 == len(images.rows)
    rows = [torch.tensor([0, 1, 2, len(images) - 1])]
    (pixels,) = StreamedImages(found, images.rows, FORM, CPU, 0).batches(rows)
    expected = read_pixels(found, FORM).pixels[rows[0]]
    assert torch.equal(pixels, torch.from_numpy(expected))


def test_an_image_that_vanishes_while_training_is_named_with_the_remedy(digit_tree):
    found = read_images(digit_tree)
    images = read_pixels(found, FORM, keep_pixels=False)
    gone = digit_tree / found.paths[3]
    gone.unlink()
    source = StreamedImages(found, images.rows, FORM, CPU, 1)
    with pytest.raises(DataError, match=f"{gone.name} could be read when training began.*--resume"):
        list(source.batches([torch.arange(6)]))


def test_a_large_set_is_not_put_into_memory():
    assert fits_in_memory(1_000, (32, 32), CPU)
    assert not fits_in_memory(10_000_000, (512, 512), CPU)
    most = 2**20
    while fits_in_memory(2 * most, (1, 1), CPU):
        most *= 2
    assert not fits_in_memory(most, (1, 1), CPU, copies=8)
