"""Bytes to pixels: the only place in the project that decodes images.

Training's evaluation, export, offline evaluation and serving all call `load_pixels`, so every stage sees the same
pixels. Mean and standard deviation are not applied here: they are part of the exported graph.
"""

import io
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field

from coterie.errors import ImageError

__all__ = [
    "IMAGE_SUFFIXES",
    "ImageSource",
    "Limits",
    "Preprocessing",
    "decode",
    "fit",
    "load_pixels",
    "read_file",
    "thumbnail",
]

Pixels = NDArray[np.uint8]
ImageSource = bytes | Path | str | Image.Image | Pixels

# Formats that Pillow decodes in process from memory; PostScript and the like start other programs.
# Multi-picture JPEG (MPO) comes in as JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2",
})
# fmt: on

# Larger images are refused below by their header's size, before Pillow's own limit would print a warning.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Limits:
    """What an image may cost: encoded bytes, and pixels counted from its header before anything is decoded."""

    max_bytes: int = 64 * 2**20
    max_pixels: int = 50_000_000


class Preprocessing(BaseModel):
    """How an upright RGB image becomes the encoder's pixels.

    Attributes:
        input_size: height and width in pixels.
        resize: `crop` scales to cover the input size and keeps the centre, `stretch` ignores the aspect ratio,
            `pad` scales to fit inside and fills the rest with the background.
        crop_fraction: with `crop`, the share of the largest centred rectangle that is kept (timm's crop_pct).
        interpolation: Pillow's filter of that name.
        background: RGB shown through transparent pixels and around padded images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_size: tuple[int, int] = Field(description="height, width")
    resize: Literal["crop", "stretch", "pad"] = "crop"
    crop_fraction: float = Field(default=1.0, gt=0, le=1)
    interpolation: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "bicubic"
    background: tuple[int, int, int] = (255, 255, 255)


def load_pixels(source: ImageSource, preprocessing: Preprocessing, limits: Limits = Limits()) -> Pixels:
    """Decode `source` and bring it to the encoder's size.

    Returns:
        uint8 array of shape (height, width, 3), RGB.

    Raises:
        ImageError: the image cannot be read, or is over a limit.
    """
    return fit(decode(source, background=preprocessing.background, limits=limits), preprocessing)


def decode(
    source: ImageSource, *, background: tuple[int, int, int] = (255, 255, 255), limits: Limits = Limits()
) -> Image.Image:
    """Return `source` as an upright RGB image: EXIF orientation applied, transparency laid over `background`.

    The first frame of an animated file is taken; 16-bit greys are scaled to 8 bits. Arrays are uint8 of shape
    (h, w), (h, w, 3) or (h, w, 4).

    Raises:
        ImageError: not an image of a supported format, damaged, or over a limit.
    """
    if isinstance(source, np.ndarray):
        image = _from_array(source)
    elif isinstance(source, Image.Image):
        image = source
    else:
        image = _open(source if isinstance(source, bytes) else read_file(Path(source), limits), limits)
    _check_size(image, limits)
    # Decoders of damaged files raise nearly anything (SyntaxError, struct.error, IndexError …).
    try:
        image.load()
        return _to_rgb(_upright(image), background)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"the image is damaged or cut short ({_reason(error)})") from error


def fit(image: Image.Image, preprocessing: Preprocessing) -> Pixels:
    """Bring an RGB image to `preprocessing.input_size`; returns uint8 (height, width, 3)."""
    height, width = preprocessing.input_size
    resample = Image.Resampling[preprocessing.interpolation.upper()]
    match preprocessing.resize:
        case "stretch":
            resized = _stretched(image, (width, height), resample)
        case "pad":
            scale = min(width / image.width, height / image.height)
            inner = max(1, round(image.width * scale)), max(1, round(image.height * scale))
            resized = Image.new("RGB", (width, height), preprocessing.background)
            resized.paste(_stretched(image, inner, resample), ((width - inner[0]) // 2, (height - inner[1]) // 2))
        case "crop":
            # One resampling straight from the kept rectangle: an image of 1 × 10,000,000 pixels stays cheap.
            scale = min(image.width / width, image.height / height) * preprocessing.crop_fraction
            # Rounding may put the edge of what covers the whole width just outside of it.
            left, top = max((image.width - width * scale) / 2, 0), max((image.height - height * scale) / 2, 0)
            box = (left, top, min(left + width * scale, image.width), min(top + height * scale, image.height))
            resized = image.resize((width, height), resample, box=box)
    return np.asarray(resized, dtype=np.uint8)


def thumbnail(image: Image.Image, size: int = 96) -> bytes:
    """A WebP of at most `size` pixels a side; small images keep their size and are stored without loss."""
    small = image.copy()
    small.thumbnail((size, size), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=80, lossless=small.width * small.height <= 32 * 32)
    return buffer.getvalue()


def read_file(path: Path, limits: Limits = Limits()) -> bytes:
    """The bytes of an image file, refused by its size before they are read.

    Raises:
        ImageError: the file cannot be read, or is over the limit.
    """
    try:
        if path.stat().st_size > limits.max_bytes:
            raise ImageError(f"{path.stat().st_size:,} bytes, over the limit of {limits.max_bytes:,}")
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot be read ({error.strerror or error})") from error


def _stretched(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    # Pillow widens before it shortens, and its filters are as long as what they shorten: an image of 1 × 10,000,000
    # pixels would take gigabytes on the way. Averaging whole pixels first, down to three times the size, does not.
    shrinks = max(image.width / size[0], image.height / size[1])
    return image.resize(size, resample, reducing_gap=3.0 if shrinks > 64 else None)


def _open(data: bytes, limits: Limits) -> Image.Image:
    if not data:
        raise ImageError("the file is empty")
    if len(data) > limits.max_bytes:
        raise ImageError(f"{len(data):,} bytes, over the limit of {limits.max_bytes:,}")
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(f"far too many pixels ({_reason(error)})") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"not an image in a supported format ({', '.join(FORMATS)})") from error
    except Exception as error:  # as above: damaged headers raise nearly anything
        raise ImageError(f"the image's header is damaged ({_reason(error)})") from error


def _check_size(image: Image.Image, limits: Limits) -> None:
    if image.width < 1 or image.height < 1:
        raise ImageError(f"the image has no pixels ({image.width} × {image.height})")
    if image.width * image.height > limits.max_pixels:
        raise ImageError(
            f"{image.width} × {image.height} pixels, over the limit of {limits.max_pixels:,}: send a smaller image"
        )


def _from_array(array: Pixels) -> Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ImageError(
            f"an array image is uint8 of shape (h, w), (h, w, 3) or (h, w, 4), not {array.dtype} {array.shape}"
        )
    if 0 in array.shape:
        raise ImageError(f"the image has no pixels, its shape is {array.shape}")
    return Image.fromarray(array)


def _upright(image: Image.Image) -> Image.Image:
    with suppress(Exception):  # a photograph with a broken EXIF block is still a photograph
        return ImageOps.exif_transpose(image)
    return image


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode == "F":
        raise ImageError("floating-point pixels have no known range: convert the image to 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255 and turns a 16-bit scan white.
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:120]
