"""How fast a bundle answers on this machine."""

import time
from dataclasses import dataclass

import numpy as np

from coterie.bundle import Bundle
from evaluation.queries import Queries

__all__ = ["Speed", "measure_speed"]

SINGLE = 40


@dataclass(frozen=True)
class Speed:
    """Seconds and rates of this process on this machine, without HTTP; they are no part of what is compared.

    Attributes:
        embedded_per_second: images through the encoder in batches, decoding not counted.
        latency_p50_ms, latency_p95_ms: one image from pixels of the encoder's size to its classification.
    """

    provider: str
    threads: int
    embedded_per_second: float
    latency_p50_ms: float
    latency_p95_ms: float


def measure_speed(bundle: Bundle, queries: Queries) -> Speed:
    """Time single images, and take the rate of the batches that were embedded."""
    rows, times = np.resize(np.arange(len(queries)), SINGLE + 5), []
    for row in rows:
        began = time.perf_counter()
        bundle.classify(queries.images.pixels[row][None])
        times.append(time.perf_counter() - began)
    p50, p95 = np.quantile(times[5:], [0.5, 0.95]) * 1e3  # the first ones warm up
    encoder = bundle.encoder
    return Speed(encoder.provider, encoder.threads, len(queries) / queries.seconds, float(p50), float(p95))
