"""Damaged image files by the thousand: each is an image or one ImageError, in bounded time and memory.

As a script it reads COUNT files made from SEED, under limits, and prints what came of them; a crash or a hang ends it
by a signal, and the number it last printed makes the file again.
"""

import importlib.util
import io
import json
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.random import Generator
from PIL import Image

from coterie.errors import ImageError
from coterie.images import Preprocessing, load_pixels

MEMORY = 1536 * 2**20  # bytes of address space beyond what the process has after its imports
SECONDS = 20  # of processor time for a file
PREPROCESSINGS = [
    Preprocessing(input_size=(32, 32)),
    Preprocessing(input_size=(224, 160), resize="pad"),
    Preprocessing(input_size=(16, 48), resize="stretch"),
]
NUMBERS = (0, 1, 2, 7, 255, 4096, 12_000, 65_535, 2**31 - 1, 2**32 - 1)
# A HEIC header: read by pillow-heif where it is installed, an error that names it where not.
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic\0\0\0\x0cmeta\0\0\0\0"


def intact() -> list[bytes]:
    """Small files of every format and kind of pixels."""
    generator = np.random.default_rng(0)
    colours = Image.fromarray(generator.integers(0, 256, (40, 56, 3), dtype=np.uint8)).resize((112, 80))
    deep = Image.fromarray(generator.integers(0, 65536, (20, 28)).astype(np.uint16))
    rgba = colours.convert("RGBA")
    rgba.putalpha(colours.convert("L"))
    rotated = Image.Exif()
    rotated[274] = 6

    def two(image: Image.Image) -> dict[str, Any]:
        return {"save_all": True, "append_images": [image.rotate(180)]}

    kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (colours, "JPEG", {"exif": rotated}),
        (colours, "JPEG", {"progressive": True, "subsampling": 0}),
        (colours.resize((640, 480)), "JPEG", {"restart_marker_rows": 1, "icc_profile": bytes(500)}),
        (colours.convert("L"), "JPEG", {}),
        (colours.convert("CMYK"), "JPEG", {}),
        (colours, "MPO", two(colours)),
        (colours, "PNG", {"exif": rotated}),
        (rgba, "PNG", {}),
        (deep, "PNG", {}),
        (colours.quantize(16), "PNG", {"transparency": 3}),
        (colours, "PNG", two(colours)),
        (colours, "WEBP", {}),
        (rgba, "WEBP", {"lossless": True}),
        (colours, "WEBP", two(colours)),
        (colours, "AVIF", {}),
        (rgba, "AVIF", two(rgba)),
        (colours, "GIF", two(colours)),
        (colours, "BMP", {}),
        (colours.quantize(16), "BMP", {}),
        (colours, "TIFF", {"compression": "jpeg"}),
        (colours, "TIFF", {"compression": "tiff_lzw", **two(colours)}),
        (colours, "TIFF", {"compression": "tiff_adobe_deflate", "exif": rotated}),
        (deep, "TIFF", {}),
        (colours.convert("1"), "TIFF", {"compression": "group4"}),
        (colours, "PPM", {}),
        (deep, "PPM", {}),
        (colours, "JPEG2000", {}),
        (rgba, "JPEG2000", {"irreversible": True, "num_resolutions": 2}),
    ]
    if importlib.util.find_spec("pillow_heif"):
        importlib.import_module("pillow_heif").register_heif_opener()
        kinds += [(colours, "HEIF", {}), (rgba, "HEIF", two(colours))]
    files = []
    for image, kind, options in kinds:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        files.append(buffer.getvalue())
    return [*files, HEIC + bytes(200)]


def bombs() -> list[bytes]:
    """Small files that state, or are, very large images, and a JPEG with thousands of scans."""
    buffers = [io.BytesIO() for _ in range(4)]
    large = Image.new("L", (7000, 7000), 200)  # 49 megapixels, just within the limit
    large.convert("LA").save(buffers[0], "PNG", compress_level=1)
    large.save(buffers[1], "GIF")
    large.save(buffers[2], "TIFF", compression="tiff_adobe_deflate")
    large.resize((3000, 3000)).save(buffers[3], "JPEG", progressive=True)
    png, gif, tiff, jpeg = (buffer.getvalue() for buffer in buffers)
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    header = struct.pack(">IIBBBBB", 12_000, 12_000, 8, 2, 0, 0, 0)
    huge = png[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + png[33:]  # 144 megapixels
    screen = gif[:6] + struct.pack("<HH", 65_535, 65_535) + gif[10:]
    return [png, gif, tiff, huge, screen, jpeg[:-2] + last * 40 + jpeg[-2:], jpeg[:-2] + last * 5000 + jpeg[-2:]]


def truncated(data: bytes, generator: Generator, files: list[bytes]) -> bytes:
    return data[: generator.integers(len(data) + 1)]


def flipped(data: bytes, generator: Generator, files: list[bytes]) -> bytes:
    changed = np.frombuffer(data, dtype=np.uint8).copy()
    places = generator.integers(len(data), size=generator.integers(1, 30))
    changed[places] ^= np.left_shift(1, generator.integers(8, size=len(places))).astype(np.uint8)
    return changed.tobytes()


def wrong_header(data: bytes, generator: Generator, files: list[bytes]) -> bytes:
    length = generator.integers(2, 64)
    return files[generator.integers(len(files))][:length] + data[length:]


def wrong_numbers(data: bytes, generator: Generator, files: list[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(generator.integers(1, 4)):
        form = ("<I", ">I", "<H", ">H")[generator.integers(4)]
        number = struct.pack(form, NUMBERS[generator.integers(len(NUMBERS))] % 2 ** (8 * struct.calcsize(form)))
        place = generator.integers(min(len(data), 200))
        changed[place : place + len(number)] = number
    return bytes(changed)


def spliced(data: bytes, generator: Generator, files: list[bytes]) -> bytes:
    other = files[generator.integers(len(files))]
    return data[: generator.integers(len(data) + 1)] + other[generator.integers(len(other) + 1) :]


def repeated(data: bytes, generator: Generator, files: list[bytes]) -> bytes:
    start, end = sorted(generator.integers(len(data) + 1, size=2))
    return data[:end] + data[start:end] * generator.integers(1, 20) + data[end:]


MUTATIONS: tuple[Callable[[bytes, Generator, list[bytes]], bytes], ...] = (
    truncated, flipped, flipped, wrong_header, wrong_numbers, spliced, repeated,
)  # fmt: skip


def read_all(count: int, seed: int) -> dict[str, Any]:
    """Read `count` files, the bombs first; ends the process where one takes too long."""
    import resource  # not on every system
    import signal

    files, first = intact(), bombs()
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    warnings.simplefilter("ignore")  # Pillow's remarks on damaged metadata
    outcomes: Counter[str] = Counter()
    slowest, slowest_number = 0.0, -1
    for number in range(count):
        generator = np.random.default_rng([seed, number])
        if number < len(first):
            data = first[number]
        else:
            data = files[number % len(files)]
            for _ in range(generator.integers(1, 3)):
                data = MUTATIONS[generator.integers(len(MUTATIONS))](data, generator, files) or b"\0"
        preprocessing = PREPROCESSINGS[number % len(PREPROCESSINGS)]
        print(number, file=sys.stderr, flush=True)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # nothing handles its signal: it ends the process
        start = time.process_time()
        try:
            pixels = load_pixels(data, preprocessing)
            assert pixels.shape == (*preprocessing.input_size, 3)
            outcomes["images"] += 1
        except ImageError as error:
            assert "\n" not in str(error)
            outcomes["memory" if "memory" in str(error) else "errors"] += 1
        signal.setitimer(signal.ITIMER_PROF, 0)
        seconds = time.process_time() - start
        if seconds > slowest:
            slowest, slowest_number = seconds, number
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**outcomes, "slowest_seconds": slowest, "slowest_file": slowest_number, "peak_mib": peak}


def outcome(count: int, seed: int) -> dict[str, Any]:
    command = [sys.executable, __file__, str(count), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=count)
    assert done.returncode == 0, f"ended by {done.returncode} at file {done.stderr[-500:]}"
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["images"] + found["errors"] + found.get("memory", 0) == count
    return found


needs_limits = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs limits on memory and time")


@needs_limits
def test_three_hundred_damaged_files_are_images_or_errors() -> None:
    found = outcome(300, seed=0)
    assert found["images"] > 30
    assert found["errors"] > 100
    assert not found.get("memory")


@needs_limits
@pytest.mark.acceptance
@pytest.mark.timeout(3600)
def test_ten_thousand_damaged_files_are_images_or_errors() -> None:
    found = outcome(10_000, seed=1)
    print(found)
    assert not found.get("memory")


if __name__ == "__main__":
    print(json.dumps(read_all(int(sys.argv[1]), int(sys.argv[2]))))
