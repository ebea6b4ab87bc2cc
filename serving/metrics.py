"""What is counted, for Prometheus to read at /metrics: the sum of all workers.

Every worker writes its counts to a file of its own in a folder that they share, and whichever is asked adds them up.
Labels are bounded: routes are templates, classes the first `MAX_CLASSES` that a worker answers with.
"""

import asyncio
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, multiprocess
from starlette.requests import Request
from starlette.responses import Response

from coterie.classifier import Classification
from serving.observer import Observer

__all__ = ["Measures", "lives", "metrics"]

MAX_CLASSES = 200
OTHER = "other"

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
SIMILARITIES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)


class Measures(Observer):
    """All that is measured; also hears of it from the engine. Safe to call from many threads.

    Args:
        folder: where the workers' counts are; None keeps those of this process in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        if folder is not None:
            # BentoML sets it to a folder that it empties whenever another service is started.
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "coterie_requests", "Requests answered.", ["method", "route", "status"], registry=registry
        )
        self._seconds = Histogram(
            "coterie_request_seconds", "From head to answer.", ["route"], buckets=SECONDS, registry=registry
        )
        self._queue = Histogram("coterie_queue_seconds", "Waiting for the encoder.", buckets=SECONDS, registry=registry)
        self._decode = Histogram(
            "coterie_decode_seconds", "Making pixels of an image.", buckets=SECONDS, registry=registry
        )
        self._encode = Histogram("coterie_encode_seconds", "Encoding a batch.", buckets=SECONDS, registry=registry)
        self._search = Histogram(
            "coterie_search_seconds", "Answering for images of a batch.", buckets=SECONDS, registry=registry
        )
        self._batch = Histogram("coterie_batch_images", "Images in a batch.", buckets=BATCHES, registry=registry)
        self._classified = Counter(
            "coterie_classified", "Images by nearest class, known or not.", ["nearest", "known"], registry=registry
        )
        self._similarity = Histogram(
            "coterie_similarity", "To the nearest class.", ["nearest"], buckets=SIMILARITIES, registry=registry
        )
        self._items = Gauge(
            "coterie_gallery_items", "In the gallery.", registry=registry, multiprocess_mode="livemostrecent"
        )
        self._under_way = Gauge(
            "coterie_images_under_way", "From arrival to answer.", registry=registry, multiprocess_mode="livesum"
        )
        self._bundle = Gauge(
            "coterie_bundle_workers",
            "Workers that serve this bundle.",
            ["bundle", "name"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._serving: tuple[str, str] | None = None
        # What labels() looks up under a lock each time.
        self._by_request: dict[tuple[str, str, int], tuple[Any, Any]] = {}
        self._by_class: dict[str, tuple[Any, Any, Any]] = {}

    def decoded(self, seconds: float) -> None:
        self._decode.observe(seconds)

    def waited(self, images: int, seconds: float) -> None:
        self._queue.observe(seconds)

    def encoded(self, images: int, seconds: float) -> None:
        self._encode.observe(seconds)
        self._batch.observe(images)

    def searched(self, images: int, seconds: float) -> None:
        self._search.observe(seconds)

    def answered(self, answers: Sequence[Any]) -> None:
        for answer in answers:
            if isinstance(answer, Classification):
                nearest = answer.classes[0].label if answer.classes else answer.best
                known, unknown, similarity = self._of_class(nearest or OTHER)
                (known if answer.known else unknown).inc()
                similarity.observe(answer.similarity)

    def requested(self, method: str, route: str, status: int, seconds: float) -> None:
        """One request was answered."""
        key = (method, route, status)
        found = self._by_request.get(key)
        if found is None:
            found = self._requests.labels(method, route, str(status)), self._seconds.labels(route)
            self._by_request[key] = found
        found[0].inc()
        found[1].observe(seconds)

    def state(self, *, bundle: str, name: str, items: int, under_way: int) -> None:
        """How things stand at the moment."""
        self._items.set(items)
        self._under_way.set(under_way)
        if self._serving != (bundle, name):
            if self._serving is not None:
                self._bundle.labels(*self._serving).set(0)
            self._serving = (bundle, name)
            self._bundle.labels(bundle, name).set(1)

    def text(self) -> bytes:
        """All workers' counts, in Prometheus's text format."""
        if self._folder is None:
            return prometheus_client.generate_latest(self._registry)
        _forget_dead_workers(self._folder)
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry, str(self._folder))
        return prometheus_client.generate_latest(registry)

    def _of_class(self, label: str) -> tuple[Any, Any, Any]:
        found = self._by_class.get(label)
        if found is None:
            label = label if len(self._by_class) < MAX_CLASSES else OTHER
            known, unknown = (self._classified.labels(label, known) for known in ("true", "false"))
            found = known, unknown, self._similarity.labels(label)
            if label != OTHER:
                self._by_class[label] = found
        return found


async def metrics(request: Request) -> Response:
    """GET /metrics: what all workers have counted."""
    content = await asyncio.to_thread(request.app.state.safety.metrics)
    return Response(content, media_type=prometheus_client.CONTENT_TYPE_LATEST)


def _forget_dead_workers(folder: Path) -> None:
    """Drop the gauges of workers that were killed; what they have counted stays."""
    for file in folder.glob("gauge_live*.db"):
        found = re.search(r"_(\d+)\.db$", file.name)
        if found and not lives(int(found[1])):
            file.unlink(missing_ok=True)


def lives(process: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
