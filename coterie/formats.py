"""Encoded files: the formats that are read, and how Pillow is made to open them, and only them.

Knows headers; the pixels are decoded in coterie/images.py.
"""

import importlib
import io
import re
import warnings

from PIL import Image, UnidentifiedImageError

from coterie.errors import ImageError

__all__ = ["IMAGE_SUFFIXES", "error_line", "open_image"]

# Formats that Pillow decodes in process from memory; PostScript and the like start other programs.
# Multi-picture JPEG (MPO) comes in as JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".heic", ".heif", ".hif",
})
# fmt: on

# The brands of HEVC images and sequences in HEIF (ISO/IEC 23008-12, annex B).
HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"})

# A scan of 70 bytes takes 30 ms where there are 48 megapixels: a megabyte of them, minutes. Progressive files have 10.
MAX_SCANS = 50
SCAN, END = b"\xff\xda", b"\xff\xd9"
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # END, and those that a length follows

# Larger images are refused by their header's size, before Pillow's own limit would print a warning.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def open_image(data: bytes, max_bytes: int) -> Image.Image:
    """Open an encoded image by its content; nothing but its header is decoded.

    Raises:
        ImageError: not of a supported format, a damaged header; over `max_bytes`, more pixels than Pillow allows or too
            many scans; a HEIC file where pillow-heif is missing.
    """
    if not data:
        raise ImageError("the file is empty")
    if len(data) > max_bytes:
        raise ImageError(f"{len(data):,} bytes, over the limit of {max_bytes:,}")
    formats: tuple[str, ...] = FORMATS
    if _is_heic(data):
        _register_heic()
        formats = ("HEIF",)
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError as error:
        raise ImageError(f"far too many pixels ({error_line(error)})") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"not an image in a supported format ({', '.join(formats)})") from error
    except Exception as error:  # damaged headers raise nearly anything: SyntaxError, struct.error, IndexError …
        raise ImageError(f"the image's header is damaged ({error_line(error)})") from error
    if image.format in ("JPEG", "MPO") and data.count(SCAN) > MAX_SCANS and (scans := _scans(data)) > MAX_SCANS:
        raise ImageError(f"the JPEG has {scans:,} scans, over the limit of {MAX_SCANS}: save it anew")
    return image


def error_line(error: Exception) -> str:
    """The first line of what an error says, or its name."""
    return (str(error) or type(error).__name__).splitlines()[0][:120]


def _is_heic(data: bytes) -> bool:
    if data[4:8] != b"ftyp":
        return False
    brands = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
    return any(brands[start : start + 4] in HEIC_BRANDS for start in range(0, len(brands), 4))


def _register_heic() -> None:
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError as error:
        raise ImageError("HEIC images need pillow-heif: install coterie[heic], or send a JPEG") from error


def _scans(data: bytes) -> int:
    """Scans of a JPEG up to its end; what telephones append to it, such as a film, does not count."""
    scans, position = 0, 2
    while (marker := MARKER.search(data, position)) and marker[0] != END:
        scans += marker[0] == SCAN
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return scans
