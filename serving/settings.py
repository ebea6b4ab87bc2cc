"""What the environment says about a service. Read once per process; nothing else in `serving` looks at it."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from platformdirs import user_state_dir

from coterie.errors import CoterieError, DeviceError
from coterie.images import Limits
from coterie.index import IndexOptions
from coterie.machine import processors
from coterie.providers import check_device
from coterie.store import CLASS_QUOTA, StoreOptions
from serving.fetch import Fetcher
from serving.limits import Bodies, RequestLimits

__all__ = ["Settings", "traced", "worker_count"]

INDEX_MEMORY = "COTERIE_INDEX_MEMORY"
TRUE, FALSE = frozenset({"1", "true", "yes", "on"}), frozenset({"0", "false", "no", "off"})


@dataclass(frozen=True)
class Settings:
    """Settings of one service; every one has a default.

    Attributes:
        bundle: COTERIE_BUNDLE, the bundle directory to serve. Without it, see `serving.model_store.find_bundle`.
        bundles: COTERIE_BUNDLES, a folder below which POST /v1/bundle takes paths; without it, only tags.
        state: COTERIE_STATE, the only folder the service writes to, one subfolder per gallery name. By default the
            platform's user state directory, on Linux ~/.local/state/coterie.
        device: COTERIE_DEVICE, where the encoder runs: auto (the default: a GPU if one answers), cpu, cuda, cuda:1,
            cuda:0,1 or cuda:all for several GPUs; tensorrt likewise.
        threads: COTERIE_THREADS, of the encoder on the CPU; by default one for each processor, or a worker's share.
        workers: COTERIE_WORKERS, how many processes serve; each loads the encoder and the gallery.
        store: COTERIE_ORIGINALS, whether enrolled images are kept (1, the default) or not (0), and COTERIE_CLASS_QUOTA,
            how many enrolled items a class may have.
        index: COTERIE_INDEX_MILLISECONDS a search of the gallery may take before it becomes approximate, and
            COTERIE_INDEX_MEMORY, bytes that the index may then take beside the embeddings.
        keys: COTERIE_KEYS, the file of the API keys, which must be there; without it keys.json in `state`, if it is.
        hosts: COTERIE_HOSTS, names beside the loopback interface's that a request without a key may come to.
        origins: COTERIE_CORS, origins of web pages that browsers let in.
        request_log: COTERIE_REQUEST_LOG, whether each request leaves a line on standard output (1, the default).
        limits: COTERIE_MAX_BODY, COTERIE_BODIES_BYTES, COTERIE_MAX_IMAGES, COTERIE_MAX_PIXELS, COTERIE_BODY_SECONDS
            and COTERIE_ANSWER_SECONDS, see `serving.limits.RequestLimits`; COTERIE_ALLOW_URLS, hosts that images are
            fetched from.
    """

    bundle: Path | None
    state: Path
    bundles: Path | None = None
    device: str = "auto"
    threads: int | None = None
    workers: int = 1
    store: StoreOptions = field(default_factory=StoreOptions)
    index: IndexOptions = field(default_factory=IndexOptions)
    keys: Path | None = None
    hosts: frozenset[str] = frozenset()
    origins: tuple[str, ...] = ()
    request_log: bool = True
    limits: RequestLimits = field(default_factory=RequestLimits)

    def __post_init__(self) -> None:
        try:
            check_device(self.device)
        except DeviceError as error:
            raise DeviceError(f"COTERIE_DEVICE: {error}") from error

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """Read the settings; an empty variable counts as unset.

        Raises:
            DeviceError: COTERIE_DEVICE is no device.
            CoterieError: another variable is not what it should be.
        """
        threads, workers = environment.get("COTERIE_THREADS") or None, _count(environment, "COTERIE_WORKERS", 1)
        if threads is not None and not (threads.isdecimal() and int(threads)):
            raise CoterieError(f"COTERIE_THREADS is {threads!r}: use a number from 1 on, or leave it unset")
        bundle, bundles = environment.get("COTERIE_BUNDLE"), environment.get("COTERIE_BUNDLES")
        keys = environment.get("COTERIE_KEYS")
        state = environment.get("COTERIE_STATE") or user_state_dir("coterie", appauthor=False)
        return cls(
            # Workers start in another folder than the command that a relative path was typed in.
            bundle=Path(bundle).expanduser().absolute() if bundle else None,
            state=Path(state).expanduser().absolute(),
            bundles=Path(bundles).expanduser().absolute() if bundles else None,
            device=environment.get("COTERIE_DEVICE") or "auto",
            threads=int(threads) if threads else max(1, processors() // workers) if workers > 1 else None,
            workers=workers,
            store=StoreOptions(
                originals=_flag(environment, "COTERIE_ORIGINALS", True),
                class_quota=_count(environment, "COTERIE_CLASS_QUOTA", CLASS_QUOTA),
            ),
            index=IndexOptions(
                latency_budget=_count(environment, "COTERIE_INDEX_MILLISECONDS", 10) / 1000,
                memory_budget=_count(environment, INDEX_MEMORY, 1) if environment.get(INDEX_MEMORY) else None,
            ),
            keys=Path(keys).expanduser().absolute() if keys else None,
            hosts=frozenset(name.lower() for name in _list(environment, "COTERIE_HOSTS")),
            origins=_origins(environment),
            request_log=_flag(environment, "COTERIE_REQUEST_LOG", True),
            limits=_limits(environment),
        )


def traced(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether requests are traced: COTERIE_OTEL, or by default where OpenTelemetry is told whom to send spans to."""
    told = any(environment.get(f"OTEL_EXPORTER_OTLP_{name}ENDPOINT") for name in ("", "TRACES_"))
    return _flag(environment, "COTERIE_OTEL", told)


def worker_count(environment: Mapping[str, str] = os.environ) -> int:
    """COTERIE_WORKERS, or one where that is no count, which the start of the service will say."""
    value = environment.get("COTERIE_WORKERS") or "1"
    return int(value) if value.isdecimal() and int(value) else 1


def _limits(environment: Mapping[str, str]) -> RequestLimits:
    usual = RequestLimits()
    max_body = _count(environment, "COTERIE_MAX_BODY", usual.max_body)
    hosts = frozenset(name.lower() for name in _list(environment, "COTERIE_ALLOW_URLS"))
    for host in hosts:
        if "/" in host or "*" in host:
            raise CoterieError(f"COTERIE_ALLOW_URLS has {host!r}: list host names alone, as images.example.org")
    pixels = _count(environment, "COTERIE_MAX_PIXELS", usual.image.max_pixels)
    image = Limits(max_bytes=min(max_body, usual.image.max_bytes), max_pixels=pixels)
    return RequestLimits(
        max_body=max_body,
        # One request of the largest size is taken in whatever this says.
        bodies=Bodies(max(max_body, _count(environment, "COTERIE_BODIES_BYTES", usual.bodies.most))),
        max_images=_count(environment, "COTERIE_MAX_IMAGES", usual.max_images),
        image=image,
        seconds=_count(environment, "COTERIE_ANSWER_SECONDS", int(usual.seconds)),
        body_seconds=_count(environment, "COTERIE_BODY_SECONDS", int(usual.body_seconds)),
        fetcher=Fetcher(hosts, max_image=image.max_bytes, max_total=max_body) if hosts else None,
    )


def _origins(environment: Mapping[str, str]) -> tuple[str, ...]:
    origins = _list(environment, "COTERIE_CORS")
    for origin in origins:
        scheme, separator, host = origin.partition("://")
        if scheme not in ("http", "https") or not separator or not host or "/" in host or "*" in host:
            raise CoterieError(f"COTERIE_CORS has {origin!r}: list origins in full, as https://app.example.org")
    return origins


def _list(environment: Mapping[str, str], name: str) -> tuple[str, ...]:
    return tuple(entry for entry in re.split(r"[\s,]+", environment.get(name) or "") if entry)


def _flag(environment: Mapping[str, str], name: str, default: bool) -> bool:
    value = environment.get(name) or str(int(default))
    if value.lower() not in TRUE | FALSE:
        raise CoterieError(f"{name} is {value!r}: use 1 or 0")
    return value.lower() in TRUE


def _count(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name) or str(default)
    if not value.isdecimal() or int(value) < 1:
        raise CoterieError(f"{name} is {value!r}: use a whole number from 1 on")
    return int(value)
