"""The decoder: tiny images at once, all others in threads, and the same pixels either way."""

import asyncio
import io
import threading
from typing import Any

import numpy as np
import pytest
from PIL import Image

from coterie.images import Limits, Preprocessing, load_pixels
from serving import decoder as decoder_module
from serving.decoder import Decoder
from serving.observer import Observer


def encoded(side: int, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG", **options)
    return buffer.getvalue()


@pytest.fixture
def threads_used(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    used: list[bool] = []

    def noting(*arguments: Any) -> Any:
        used.append(threading.current_thread() is not threading.main_thread())
        return load_pixels(*arguments)

    monkeypatch.setattr(decoder_module, "load_pixels", noting)
    return used


def decoded(images: list[bytes], side: int = 16) -> Any:
    preprocessing = Preprocessing(input_size=(side, side))
    one = Decoder(preprocessing, Limits(), threads=2, observer=Observer())
    try:
        return asyncio.run(one.decode(images))
    finally:
        one.close()


def test_a_lone_tiny_image_is_decoded_at_once(threads_used: list[bool]) -> None:
    image = encoded(32)
    pixels, errors = decoded([image])
    assert threads_used == [False] and not errors
    np.testing.assert_array_equal(pixels[0], load_pixels(image, Preprocessing(input_size=(16, 16))))


def flat(side: int) -> bytes:
    """Few bytes, many pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("images", "side"),
    [([encoded(32)] * 2, 16), ([encoded(60)], 16), ([flat(500)], 16), ([encoded(32)], 224)],
    ids=["several", "many bytes", "many pixels", "a large encoder"],
)
def test_all_others_are_decoded_in_threads(threads_used: list[bool], images: list[bytes], side: int) -> None:
    pixels, errors = decoded(images, side)
    assert threads_used[-len(images) :] == [True] * len(images) and not errors
    for row, image in enumerate(images):
        np.testing.assert_array_equal(pixels[row], load_pixels(image, Preprocessing(input_size=(side, side))))


def test_what_is_no_image_gets_the_threads_error() -> None:
    pixels, errors = decoded([b"no image"])
    assert len(pixels) == 0
    assert "not an image" in str(errors[0])
