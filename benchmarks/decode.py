"""Images per second that one core turns into an encoder's pixels, by format and target; what reducing JPEGs changes.

    python -m benchmarks.decode PHOTOS [--images 50] [--runs 3] [--encoder RUN] [--json FILE]

PHOTOS is a folder of JPEGs. They are measured as they are, saved anew in other formats, and, eight of them, enlarged to
a telephone's 12 megapixels. Each cell is the median of --runs, in images per second of processor time: of one core,
whatever else the machine does. `whole` decodes all pixels of a JPEG, as of every other format; `reduced` is what
`load_pixels` does. Where the two differ, their difference is given in grey levels, and with --encoder, the directory of
a run, the cosine of the embeddings.

One core of a shared AVX-512 machine beside much other work, Pillow 13.0.0, 24 photographs of about 500 × 375:

    format      target   reduced   whole   difference   cosine, 1st percentile (a ResNet-8 of CIFAR-10)
    JPEG           128       200     204   none is reduced
    JPEG            64       199     190   0.31         0.9996, of the quarter that is reduced
    JPEG            32       306     177   0.24         0.9992
    JPEG 12 MP     224        22       6   0.23         0.9999
    JPEG 12 MP      64        38       6   0.14         1.0000
    PNG            224        79
    WEBP           224       108
    AVIF           224        86
"""

import argparse
import io
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

from coterie.files import write_text
from coterie.images import Preprocessing, decode, decode_to_fit, fit, load_pixels

TARGETS = (224, 128, 64, 32)
TELEPHONE = (4000, 3000)
OTHERS: dict[str, dict[str, Any]] = {"PNG": {}, "WEBP": {"quality": 80}, "AVIF": {"quality": 75}}

Embed = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


@dataclass(frozen=True)
class Cell:
    """One format at one target.

    Attributes:
        reduced, whole: images per second of processor time.
        share: of the images that are decoded at reduced size.
        difference, worst_image: mean absolute difference in grey levels of these, over all and of the worst.
        cosine_p1, cosine_median: of their embeddings, reduced against whole.
    """

    format: str
    target: int
    images: int
    reduced: float
    whole: float
    share: float
    difference: float | None = None
    worst_image: float | None = None
    cosine_p1: float | None = None
    cosine_median: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--encoder", type=Path, help="a run whose encoder embeds them")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    embed = embedder(arguments.encoder) if arguments.encoder else None
    cells = []
    print(f"{'format':>10} {'target':>7} {'reduced':>8} {'whole':>8} {'share':>6}  difference  worst image  cosine p1")
    for name, files in inputs(arguments.photos, arguments.images).items():
        for target in TARGETS:
            cell = measure(name, files, target, arguments.runs, embed)
            cells.append(cell)
            more = [
                f"{value:.5g}" for value in (cell.difference, cell.worst_image, cell.cosine_p1) if value is not None
            ]
            print(
                f"{name:>10} {target:>7} {cell.reduced:>8.0f} {cell.whole:>8.0f} {cell.share:>6.2f}  {'  '.join(more)}",
                flush=True,
            )
    if arguments.json:
        libraries = {name: features.version(name) for name in ("pil", "libjpeg_turbo", "webp", "avif")}
        about = {"machine": platform.machine(), "python": platform.python_version(), "libraries": libraries}
        write_text(arguments.json, json.dumps(about | {"cells": [asdict(cell) for cell in cells]}, indent=1) + "\n")


def inputs(photos: Path, count: int) -> dict[str, list[bytes]]:
    """Encoded images by the name of their kind."""
    jpegs = [path.read_bytes() for path in sorted(photos.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg")][
        :count
    ]
    if not jpegs:
        raise SystemExit(f"{photos} has no JPEGs")
    images = [decode(data) for data in jpegs]
    large = [image.resize(TELEPHONE, Image.Resampling.BICUBIC) for image in images[:8]]
    return {
        "JPEG": jpegs,
        "JPEG 12 MP": [encoded(image, "JPEG", quality=90) for image in large],
        **{kind: [encoded(image, kind, **options) for image in images] for kind, options in OTHERS.items()},
    }


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def measure(name: str, files: Sequence[bytes], target: int, runs: int, embed: Embed | None) -> Cell:
    preprocessing = Preprocessing(input_size=(target, target))

    def whole_pixels(data: bytes) -> NDArray[np.uint8]:
        return fit(decode(data), preprocessing)

    whole = np.stack([whole_pixels(data) for data in files])  # (n, h, w, 3); and a warm-up
    pixels = np.stack([load_pixels(data, preprocessing) for data in files])
    differs = np.asarray(
        [decode_to_fit(data, preprocessing)[0].size != Image.open(io.BytesIO(data)).size for data in files]
    )
    rates: dict[str, list[float]] = {"reduced": [], "whole": []}
    for _ in range(runs):
        rates["reduced"].append(rate(lambda data: load_pixels(data, preprocessing), files))
        rates["whole"].append(rate(whole_pixels, files))
    changes: dict[str, float] = {}
    if differs.any():
        each = np.abs(pixels[differs].astype(np.int16) - whole[differs]).mean(axis=(1, 2, 3))
        changes = {"difference": float(each.mean()), "worst_image": float(each.max())}
        if embed:
            cosines = (embed(pixels[differs]) * embed(whole[differs])).sum(axis=1)
            changes |= {"cosine_p1": float(np.percentile(cosines, 1)), "cosine_median": float(np.median(cosines))}
    return Cell(
        format=name,
        target=target,
        images=len(files),
        share=float(differs.mean()),
        **{kind: statistics.median(values) for kind, values in rates.items()},
        **changes,
    )


def rate(load: Callable[[bytes], object], files: Sequence[bytes]) -> float:
    start = time.process_time()
    for data in files:
        load(data)
    return len(files) / (time.process_time() - start)


def embedder(run: Path) -> Embed:
    """The run's encoder, which here takes images of any size; to unit length."""
    import torch
    from torch.nn import functional as F

    from training.run import Run

    encoder, _ = Run(run).load_encoder()

    def embed(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        with torch.inference_mode():
            embeddings: NDArray[np.float32] = F.normalize(
                torch.cat([encoder(part) for part in images.split(16)])
            ).numpy()
        return embeddings

    return embed


if __name__ == "__main__":
    main()
