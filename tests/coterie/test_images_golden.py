"""Golden images: what each kind of file means, with the pixels that it must give."""

import importlib.util
import io
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from coterie.dataset import read_folder, read_pixels
from coterie.errors import ImageError
from coterie.images import Preprocessing, decode, decode_to_fit, fit, load_pixels

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
PICTURE = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)

# What each EXIF orientation asks the viewer to do with the stored pixels (EXIF 2.3, tag 274).
ORIENTATIONS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def encoded(image: Image.Image | NDArray[Any], kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def pixels_of(data: bytes, **options: Any) -> NDArray[np.uint8]:
    return np.asarray(decode(data, **options))


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    return exif


def png(*parts: tuple[bytes, bytes]) -> bytes:
    """A PNG of these chunks."""
    chunks = [*parts, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


# Kinds of pixels


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_the_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    data = encoded(PICTURE, kind, exif=oriented(orientation), **options)
    np.testing.assert_array_equal(pixels_of(data), ORIENTATIONS[orientation](PICTURE))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_broken_exif_block_does_not_spoil_the_image() -> None:
    data = encoded(PICTURE, "PNG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff garbage")
    np.testing.assert_array_equal(pixels_of(data), PICTURE)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kind", ["JPEG", "AVIF"])
def test_photographs_are_turned_upright(orientation: int, kind: str) -> None:
    quarters = np.kron([[0, 80], [160, 240]], np.ones((16, 24))).astype(np.uint8)  # (32, 48)
    found = pixels_of(encoded(quarters, kind, quality=95, exif=oriented(orientation)))[..., 0].astype(int)
    expected = ORIENTATIONS[orientation](quarters)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 6


def test_cmyk_becomes_rgb() -> None:
    data = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    assert np.abs(pixels_of(data).astype(int) - RED).max() <= 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_pixels_show_the_background(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert np.asarray(decode(image.convert(mode), background=GREEN)).tolist() == [[[0, 0, 0], list(GREEN)]]


def test_half_transparent_pixels_mix_with_the_background() -> None:
    data = encoded(Image.new("RGBA", (1, 1), (*RED, 128)))
    assert pixels_of(data, background=WHITE).tolist() == [[[255, 127, 127]]]
    assert pixels_of(data, background=BLUE).tolist() == [[[128, 0, 127]]]


def test_a_transparent_palette_colour_shows_the_background() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    one, each = encoded(image, transparency=1), encoded(image, transparency=bytes([255, 0]))
    assert pixels_of(one).tolist() == pixels_of(each).tolist() == [[list(RED), list(WHITE)]]


@pytest.mark.parametrize("kind", ["WEBP", "AVIF", "GIF"])
def test_transparency_is_laid_over_the_background_in_every_format_that_has_it(kind: str) -> None:
    image = Image.new("RGBA", (16, 16), (*RED, 255))
    image.paste((0, 0, 0, 0), (8, 0, 16, 16))
    options: dict[str, Any] = {"AVIF": {"quality": 100, "subsampling": "4:4:4"}, "WEBP": {"lossless": True}, "GIF": {}}
    found = pixels_of(encoded(image, kind, **options[kind]), background=GREEN).astype(int)
    assert np.abs(found[:, :8] - RED).max() <= 2
    assert np.abs(found[:, 8:] - GREEN).max() <= 2


def test_half_transparent_greys_mix_with_the_background() -> None:
    # 100 · 51/255 + (255, 0, 0) · 204/255 = (20 + 204, 20, 20)
    data = encoded(Image.new("LA", (1, 1), (100, 51)))
    assert pixels_of(data, background=RED).tolist() == [[[224, 20, 20]]]


@pytest.mark.parametrize(("mode", "colour"), [("L", 9), ("RGB", (9, 9, 9)), ("1", 0)])
def test_a_single_transparent_colour_shows_the_background(mode: str, colour: Any) -> None:
    data = encoded(Image.new(mode, (1, 1), colour), transparency=colour)
    assert pixels_of(data, background=GREEN).tolist() == [[list(GREEN)]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_greys_keep_their_shades(kind: str) -> None:
    data = encoded(np.asarray([[0, 257, 32896, 65535]], dtype=np.uint16), kind)
    assert pixels_of(data)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_sixteen_bit_greys_are_turned_upright_too() -> None:
    grey = (PICTURE[..., 0].astype(np.uint16)) * 257
    data = encoded(grey, exif=oriented(6))
    np.testing.assert_array_equal(pixels_of(data)[..., 0], np.rot90(PICTURE[..., 0], -1))


def test_a_transparent_sixteen_bit_grey_shows_the_background() -> None:
    # Greys 1000 and 65535, of which tRNS names 1000: 65535 becomes 255.
    header = struct.pack(">IIBBBBB", 2, 1, 16, 0, 0, 0, 0)
    parts = (b"IHDR", header), (b"tRNS", struct.pack(">H", 1000)), (b"IDAT", zlib.compress(b"\0\x03\xe8\xff\xff"))
    assert pixels_of(png(*parts), background=GREEN).tolist() == [[list(GREEN), list(WHITE)]]


def test_sixteen_bit_colours_keep_their_shades() -> None:
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    data = png((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + struct.pack(">HHH", 0, 0x8080, 0xFFFF))))
    assert pixels_of(data).tolist() == [[[0, 128, 255]]]


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(ImageError, match="floating-point"):
        decode(encoded(np.zeros((2, 2), dtype=np.float32), "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_the_first_frame_of_an_animation_counts(kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    assert np.abs(pixels_of(data).astype(int) - RED).max() <= 2


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF", "JPEG2000", "BMP", "PPM", "GIF", "TIFF", "PNG"])
def test_every_format_gives_its_picture(kind: str) -> None:
    picture = Image.new("RGB", (24, 16), (200, 100, 50))
    found = pixels_of(encoded(picture, kind))
    assert found.shape == (16, 24, 3)
    assert np.abs(found.astype(int) - (200, 100, 50)).max() <= 6


def test_one_pixel_is_an_image() -> None:
    assert (load_pixels(encoded(Image.new("RGB", (1, 1), BLUE)), Preprocessing(input_size=(8, 8))) == BLUE).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "YCbCr", "HSV", "CMYK", "I", "RGBX", "LAB"])
def test_images_of_every_mode_become_rgb(mode: str) -> None:
    assert decode(Image.new(mode, (3, 2))).mode == "RGB"


# HEIC

HEIC = b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(100)


@pytest.mark.parametrize("brand", [b"heic", b"mif1"])
def test_heic_without_its_extra_is_an_error_that_names_it(brand: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    with pytest.raises(ImageError, match=r"install coterie\[heic\]"):
        decode(HEIC.replace(b"mif1", brand, 1))


@pytest.mark.skipif(not importlib.util.find_spec("pillow_heif"), reason="needs the extra heic")
def test_heic_is_read_and_turned_upright() -> None:
    importlib.import_module("pillow_heif").register_heif_opener()
    quarters = np.kron([[0, 80], [160, 240]], np.ones((32, 48))).astype(np.uint8)  # (64, 96)
    found = pixels_of(encoded(quarters, "HEIF", quality=90, exif=oriented(6).tobytes()))[..., 0].astype(int)
    assert found.shape == (96, 64)
    assert np.abs(found - np.rot90(quarters, -1)).max() <= 10
    with pytest.raises(ImageError, match=r"supported format \(HEIF\)|damaged"):
        decode(HEIC)


# JPEG at reduced size


def waves(width: int, height: int) -> NDArray[np.uint8]:
    """Sine waves 50 pixels long: a shift by one pixel changes a grey by up to 100 · 2π/50 = 13."""
    rows, columns = np.ogrid[:height, :width]
    return np.stack(
        [
            128 + 100 * np.sin(columns * 2 * np.pi / 50 + rows * 0),
            128 + 100 * np.sin(rows * 2 * np.pi / 50 + columns * 0),
            np.full((height, width), 128.0),
        ],
        axis=2,
    ).astype(np.uint8)


@pytest.mark.parametrize(
    ("size", "preprocessing", "decoded"),
    [
        # 375/64 = 5.9: half the size would leave 2.9 pixels for each.
        ((500, 375), {"input_size": (64, 64)}, (500, 375)),
        ((500, 375), {"input_size": (62, 62)}, (250, 188)),
        ((768, 768), {"input_size": (128, 128)}, (384, 384)),
        ((766, 768), {"input_size": (128, 128)}, (766, 768)),
        # 3000/224 = 13.4: a quarter leaves 3.3 of them.
        ((4000, 3000), {"input_size": (224, 224)}, (1000, 750)),
        ((4000, 3000), {"input_size": (125, 125)}, (500, 375)),
        # Of 375 rows the middle half is kept: 187/32 = 5.9.
        ((500, 375), {"input_size": (32, 32), "crop_fraction": 0.5}, (500, 375)),
        # To fit inside, 500 columns become 64: 7.8.
        ((500, 250), {"input_size": (64, 64), "resize": "pad"}, (250, 125)),
        ((500, 250), {"input_size": (64, 64), "resize": "stretch"}, (500, 250)),
        ((500, 384), {"input_size": (64, 64), "resize": "stretch"}, (250, 192)),
        ((3000, 1), {"input_size": (64, 64), "resize": "pad"}, (3000, 1)),
        ((500, 375), {"input_size": (32, 32), "interpolation": "nearest"}, (500, 375)),
        # 500/8 would be less than a thumbnail's 96.
        ((500, 375), {"input_size": (8, 8)}, (125, 94)),
    ],
)
def test_a_jpeg_is_reduced_where_three_pixels_or_more_remain_for_each(
    size: tuple[int, int], preprocessing: dict[str, Any], decoded: tuple[int, int]
) -> None:
    data = encoded(Image.new("RGB", size), "JPEG")
    assert decode_to_fit(data, Preprocessing(**preprocessing))[0].size == decoded


def test_the_orientation_decides_which_side_is_which() -> None:
    data = encoded(Image.new("RGB", (384, 768)), "JPEG", exif=oriented(6))
    assert decode_to_fit(data, Preprocessing(input_size=(64, 128)))[0].size == (384, 192)
    assert decode_to_fit(data, Preprocessing(input_size=(128, 64)))[0].size == (768, 384)


@pytest.mark.parametrize(
    ("orientation", "box"),
    [
        # 1003 × 781 at a quarter: 250.75 × 195.25 in 251 × 196 pixels, from the corner that was stored first.
        (1, (0, 0, 250.75, 195.25)),
        (2, (0.25, 0, 251, 195.25)),
        (3, (0.25, 0.75, 251, 196)),
        (4, (0, 0.75, 250.75, 196)),
        (5, (0, 0, 195.25, 250.75)),
        (6, (0.75, 0, 196, 250.75)),
        (7, (0.75, 0.25, 196, 251)),
        (8, (0, 0.25, 195.25, 251)),
    ],
)
def test_a_reduced_picture_keeps_its_place(orientation: int, box: tuple[float, ...]) -> None:
    preprocessing = Preprocessing(input_size=(64, 64))
    data = encoded(waves(1003, 781), "JPEG", quality=95, subsampling=0, exif=oriented(orientation))
    image, found = decode_to_fit(data, preprocessing)
    assert found == box
    whole = fit(decode(data), preprocessing).astype(int)
    differences = np.abs(fit(image, preprocessing, found) - whole)
    assert differences.max() <= 10  # at the edge, where a row mixes with what fills its block
    assert differences.mean() < 0.5 < 2 < np.abs(fit(image, preprocessing) - whole).mean()


def test_blocks_become_their_means() -> None:
    # At an eighth of the size each block of 8 × 8 pixels becomes one, and 3 × 3 of those one of the result.
    greys = np.random.default_rng(4).integers(0, 256, (32, 32), dtype=np.uint8)
    data = encoded(np.kron(greys, np.ones((24, 24), dtype=np.uint8)), "JPEG", quality=100)
    image, _ = decode_to_fit(data, Preprocessing(input_size=(32, 32), interpolation="box"))
    assert image.size == (96, 96)
    found = load_pixels(data, Preprocessing(input_size=(32, 32), interpolation="box"))
    assert np.abs(found[..., 0].astype(int) - greys).max() <= 2


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_greys_and_cmyk_are_reduced_too(mode: str) -> None:
    data = encoded(Image.fromarray(waves(512, 512)).convert(mode), "JPEG", quality=95)
    preprocessing = Preprocessing(input_size=(64, 64))
    assert decode_to_fit(data, preprocessing)[0].size == (256, 256)
    whole = fit(decode(data), preprocessing).astype(int)
    assert np.abs(load_pixels(data, preprocessing) - whole).max() <= 4


def test_the_first_picture_of_several_is_reduced_too() -> None:
    first, second = Image.fromarray(waves(512, 512)), Image.new("RGB", (512, 512))
    data = encoded(first, "MPO", save_all=True, append_images=[second], quality=95)
    preprocessing = Preprocessing(input_size=(64, 64))
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert decode_to_fit(data, preprocessing)[0].size == (256, 256)
    whole = fit(decode(data), preprocessing).astype(int)
    assert np.abs(load_pixels(data, preprocessing) - whole).max() <= 4


def test_what_is_no_jpeg_file_is_not_reduced() -> None:
    preprocessing = Preprocessing(input_size=(64, 64))
    opened = Image.open(io.BytesIO(encoded(waves(512, 512), "JPEG")))
    for source in (waves(512, 512), encoded(waves(512, 512)), opened):
        assert decode_to_fit(source, preprocessing)[0].size == (512, 512)
    assert opened.size == (512, 512)


def test_every_stage_sees_the_same_pixels(tmp_path: Path) -> None:
    file = tmp_path / "waves" / "photo.jpg"
    file.parent.mkdir()
    file.write_bytes(encoded(waves(1003, 781), "JPEG", exif=oriented(6)))
    preprocessing = Preprocessing(input_size=(64, 64))
    expected = load_pixels(file, preprocessing)
    np.testing.assert_array_equal(load_pixels(file.read_bytes(), preprocessing), expected)
    for thumbnails in (False, True):
        found = read_pixels(read_folder(tmp_path), preprocessing, thumbnails=thumbnails)
        np.testing.assert_array_equal(found.pixels[0], expected)
