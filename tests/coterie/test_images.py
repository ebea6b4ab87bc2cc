"""Bytes to pixels: every kind of source, of damage and of size; what the pixels are is in test_images_golden.py."""

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFile

from coterie.errors import ImageError
from coterie.images import Limits, Preprocessing, decode, fit, load_pixels, thumbnail

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
PICTURE = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
SQUARE = Preprocessing(input_size=(8, 8))


def encoded(image: Image.Image | NDArray[Any], kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def pixels_of(data: bytes, **options: Any) -> NDArray[np.uint8]:
    return np.asarray(decode(data, **options))


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header states a size that its few bytes of pixels do not have."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


# Sources


def test_every_kind_of_source_gives_the_same_pixels(tmp_path: Path) -> None:
    data = encoded(PICTURE)
    file = tmp_path / "image.png"
    file.write_bytes(data)
    sources = [file, str(file), data, Image.fromarray(PICTURE), Image.open(file), PICTURE, np.asfortranarray(PICTURE)]
    for source in sources:
        np.testing.assert_array_equal(load_pixels(source, SQUARE), load_pixels(data, SQUARE))


def test_grey_and_transparent_arrays_are_images() -> None:
    assert decode(np.full((2, 3), 7, dtype=np.uint8)).getpixel((0, 0)) == (7, 7, 7)
    assert decode(np.zeros((2, 3, 4), dtype=np.uint8)).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (np.float32, (2, 2, 3)),
        (np.uint16, (2, 2)),
        (bool, (2, 2)),
        (np.uint8, (3, 2, 2)),
        (np.uint8, (1, 2, 2, 3)),
        (np.uint8, (2,)),
    ],
)
def test_other_arrays_are_refused(dtype: type, shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match=r"an array image is uint8 of shape .* not"):
        decode(np.zeros(shape, dtype=dtype))


def test_an_array_without_pixels_is_refused() -> None:
    with pytest.raises(ImageError, match="no pixels"):
        decode(np.zeros((0, 5, 3), dtype=np.uint8))


def test_a_png_named_jpg_is_read_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "photo.jpg"
    file.write_bytes(encoded(PICTURE))
    np.testing.assert_array_equal(np.asarray(decode(file)), PICTURE)


@pytest.mark.parametrize("name", ["missing.png", "."])
def test_a_path_that_cannot_be_read_is_an_image_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ImageError, match=r"cannot be read \((No such file|Is a directory|Permission)"):
        decode(tmp_path / name)


# Damage


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"not an image at all", "not an image in a supported format"),
        (b"\x89PNG\r\n\x1a\n", "damaged|supported"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "supported format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "supported format"),
        (encoded(Image.new("RGB", (16, 16)), "ICO"), "supported format"),
    ],
)
def test_what_is_no_image_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        decode(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM"])
def test_half_a_file_is_refused(kind: str) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(noise, kind)
    with pytest.raises(ImageError):
        decode(data[: len(data) // 2])


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on damaged TIFF tags
@settings(max_examples=150)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"]),
    changes=st.dictionaries(st.integers(0, 10_000), st.integers(1, 255), min_size=1, max_size=8),
)
def test_a_damaged_file_is_an_image_or_an_image_error(kind: str, changes: dict[int, int]) -> None:
    data = bytearray(encoded(np.tile(PICTURE, (4, 4, 1)), kind))
    for position, change in changes.items():
        data[position % len(data)] ^= change
    try:
        image = decode(bytes(data), limits=Limits(max_pixels=1_000_000))
    except ImageError:
        return
    assert image.mode == "RGB"


@given(st.binary(max_size=200))
def test_any_bytes_are_an_image_or_an_image_error(data: bytes) -> None:
    try:
        decode(data)
    except ImageError as error:
        assert "\n" not in str(error)


# Limits


@pytest.mark.parametrize("size", [(8000, 7000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_by_its_header_alone(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("the pixels were decoded"))
    with pytest.raises(ImageError, match="pixels"):
        decode(png_claiming(*size))


def test_the_pixel_limit_counts_for_every_source_and_is_inclusive() -> None:
    limits = Limits(max_pixels=35)
    for source in (encoded(PICTURE), PICTURE, Image.fromarray(PICTURE)):
        assert decode(source, limits=limits).size == (7, 5)
        with pytest.raises(ImageError, match=r"7 × 5 pixels, over the limit of 34"):
            decode(source, limits=Limits(max_pixels=34))


def test_the_byte_limit_is_inclusive() -> None:
    data = encoded(PICTURE)
    decode(data, limits=Limits(max_bytes=len(data)))
    with pytest.raises(ImageError, match=f"{len(data)} bytes, over the limit of {len(data) - 1}"):
        decode(data, limits=Limits(max_bytes=len(data) - 1))


def test_a_file_over_the_byte_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "image.png"
    file.write_bytes(encoded(PICTURE))
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("the file was read"))
    with pytest.raises(ImageError, match="over the limit of 10"):
        decode(file, limits=Limits(max_bytes=10))


def test_a_jpeg_of_a_thousand_scans_is_refused_before_they_are_decoded() -> None:
    data = encoded(Image.fromarray(PICTURE), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    decode(data[:-2] + last * 40 + data[-2:])
    with pytest.raises(ImageError, match=r"1,\d\d\d scans, over the limit of 50"):
        decode(data[:-2] + last * 1000 + data[-2:])


def test_a_film_after_a_photograph_does_not_count_as_scans() -> None:
    data = encoded(PICTURE, "JPEG")
    np.testing.assert_array_equal(pixels_of(data + b"\xff\xda\x00\x02" * 1000), pixels_of(data))


def test_too_little_memory_is_not_called_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: ImageFile.ImageFile) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(ImageError, match="memory does not suffice for its 7 × 5 pixels"):
        decode(encoded(PICTURE))


# Geometry


def thirds(width: int, height: int) -> NDArray[np.uint8]:
    """Red, green and blue, side by side (or on top of one another where the image is tall)."""
    image = np.empty((height, width, 3), dtype=np.uint8)
    parts = np.array_split(np.arange(max(width, height)), 3)
    for colour, part in zip((RED, GREEN, BLUE), parts, strict=True):
        if width >= height:
            image[:, part] = colour
        else:
            image[part] = colour
    return image


@pytest.mark.parametrize(("width", "height"), [(24, 8), (8, 24)])
def test_crop_keeps_the_centre(width: int, height: int) -> None:
    assert (load_pixels(thirds(width, height), SQUARE) == GREEN).all()


def test_crop_fraction_keeps_the_share_it_names() -> None:
    picture = np.random.default_rng(2).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    found = load_pixels(picture, Preprocessing(input_size=(8, 8), crop_fraction=0.5))
    np.testing.assert_array_equal(found, picture[4:12, 4:12])


def test_crop_covers_an_input_that_is_not_square() -> None:
    found = load_pixels(thirds(24, 24), Preprocessing(input_size=(4, 12), interpolation="nearest"))
    assert found[0, :, :].tolist() == [list(RED)] * 4 + [list(GREEN)] * 4 + [list(BLUE)] * 4


def test_stretch_shows_everything() -> None:
    found = load_pixels(thirds(24, 8), Preprocessing(input_size=(8, 6), resize="stretch", interpolation="box"))
    assert found[3].tolist() == [list(RED)] * 2 + [list(GREEN)] * 2 + [list(BLUE)] * 2


def test_pad_shows_everything_between_bars_of_the_background() -> None:
    preprocessing = Preprocessing(input_size=(6, 6), resize="pad", interpolation="box", background=(1, 2, 3))
    found = load_pixels(thirds(24, 8), preprocessing)
    assert (found[[0, 1, 4, 5]] == (1, 2, 3)).all()
    assert found[2].tolist() == found[3].tolist() == [list(RED)] * 2 + [list(GREEN)] * 2 + [list(BLUE)] * 2


@pytest.mark.parametrize("resize", ["crop", "stretch", "pad"])
@pytest.mark.parametrize("interpolation", ["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"])
def test_an_image_of_the_right_size_is_left_as_it_is(resize: Any, interpolation: Any) -> None:
    picture = np.random.default_rng(3).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    found = load_pixels(picture, Preprocessing(input_size=(8, 8), resize=resize, interpolation=interpolation))
    np.testing.assert_array_equal(found, picture)


side = st.integers(1, 700)


@given(
    size=st.tuples(side, side), target=st.tuples(st.integers(1, 300), st.integers(1, 300)), fraction=st.floats(0.05, 1)
)
# Sizes whose centred rectangle starts a rounding error outside of the image.
@example(size=(29, 29), target=(224, 32), fraction=1.0)
@example(size=(57, 80), target=(224, 224), fraction=1.0)
@example(size=(1, 700), target=(32, 32), fraction=1.0)
@example(size=(624, 624), target=(1, 1), fraction=1.0)
@pytest.mark.parametrize("resize", ["crop", "stretch", "pad"])
def test_an_image_of_any_size_fits_any_input(
    resize: Any, size: tuple[int, int], target: tuple[int, int], fraction: float
) -> None:
    preprocessing = Preprocessing(input_size=target, resize=resize, crop_fraction=fraction, background=BLUE)
    found = fit(Image.new("RGB", size, RED), preprocessing)
    assert (found.shape, found.dtype) == ((*target, 3), np.uint8)
    # One colour stays one colour, to the rounding of the resampling's weights, and however thin the image, something of
    # it is to be seen.
    red = (abs(found.astype(int) - RED) <= 1).all(axis=2)
    assert red.any()
    assert resize == "pad" or red.all()


@pytest.mark.parametrize("edge", [224, 299])
def test_no_width_is_lost_to_rounding(edge: int) -> None:
    preprocessing = Preprocessing(input_size=(edge, edge), interpolation="nearest")
    for width in range(1, 1000):
        assert fit(Image.new("RGB", (width, width + 1)), preprocessing).shape == (edge, edge, 3)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a limit on memory")
@pytest.mark.parametrize("resize", ["crop", "stretch", "pad"])
def test_a_long_thin_image_stays_cheap(resize: str) -> None:
    code = """
import resource, sys
from PIL import Image
from coterie.images import Preprocessing, fit, thumbnail
preprocessing = Preprocessing(input_size=(224, 224), resize=sys.argv[1])
for size in ((1, 10_000_000), (10_000_000, 1)):
    image = Image.new("RGB", size)
    now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 300 * 2**20, resource.RLIM_INFINITY))
    assert fit(image, preprocessing).shape == (224, 224, 3)
    assert len(thumbnail(image)) < 1000
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, resize], env=environment, check=True)


def test_a_thumbnail_is_a_small_webp_of_the_same_shape() -> None:
    small = Image.open(io.BytesIO(thumbnail(Image.fromarray(thirds(1200, 400)))))
    assert (small.format, small.size) == ("WEBP", (96, 32))


def test_a_tiny_image_is_its_own_thumbnail() -> None:
    np.testing.assert_array_equal(pixels_of(thumbnail(Image.fromarray(PICTURE))), PICTURE)


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.1])
def test_a_crop_fraction_outside_of_zero_to_one_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="crop_fraction"):
        Preprocessing(input_size=(8, 8), crop_fraction=fraction)
