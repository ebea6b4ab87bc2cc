"""The BentoML service: `bentoml serve serving.service:Coterie`, or `bentoml serve` in the project's root.

BentoML starts the workers, answers /healthz, /livez and /readyz, and describes itself to its clients at /schema.json;
every other path is the application's of `serving.routes`, mounted at the root.
"""

import gc
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

# BentoML reports who serves what, and looks for this when it is imported.
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")

import bentoml

from coterie.bundle import Bundle
from coterie.errors import CoterieError, DeviceError
from serving.access import Access
from serving.engine import Engine
from serving.model_store import find_bundle
from serving.pointer import bundle_to_serve, end_older_swap
from serving.records import Recorder
from serving.routes import build_app
from serving.safety import Safety, check_safety, metrics_folder
from serving.served import Served
from serving.settings import Settings, traced, worker_count
from serving.shortcuts import Straight, remove_time_limit
from serving.swapping import Swapper

__all__ = ["Coterie"]

logger = logging.getLogger("coterie.serving")

app = build_app()

CHECK_SECONDS = 3

PROBES = ["/healthz", "/livez", "/readyz", "/metrics"]
# A span for each request would cost more than a small encoder takes for the image, unless somebody wants to see them.
TRACING: dict[str, Any] = {"excluded_urls": [*PROBES, "/v1/", "/embed", "/classify"]}
if traced():
    # OpenTelemetry's own variables say whom spans are sent to, and how many.
    TRACING = {"excluded_urls": PROBES, "exporter_type": "otlp", "sample_rate": 1.0, "otlp": {"protocol": "http"}}

SWITCH_SECONDS = 0.0005
# The end waits no longer for somebody to take the last spans.
FLUSH_SECONDS = 3.0


@bentoml.service(
    workers=worker_count(),
    # Anybody who reaches the port may ask, so it is open to this machine alone unless --host says otherwise.
    http={"host": "127.0.0.1"},
    # BentoML's metrics make a time series of every path that anybody asks for.
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
    tracing=TRACING,
)
@bentoml.asgi_app(app, path="/")
class Coterie:
    """Supervised contrastive image embeddings and open-set labels.

    Its methods are what /schema.json tells BentoML's clients of; `serving.native` answers them.
    """

    @bentoml.api
    async def embed(self, images: list[str]) -> list[list[float]]:
        """One embedding of unit length for each image, a base64 string or data URI."""
        raise NotImplementedError

    @bentoml.api
    async def classify(
        self, images: list[str], false_reject: float = 0.05, top: int = 5, neighbors: int = 5
    ) -> list[dict[str, Any]]:
        """Label or unknown for each image, a base64 string or data URI; entries as /v1/classify has them."""
        raise NotImplementedError

    def __init__(self) -> None:
        # BentoML's logging shows warnings only; what this service decided at its start is worth a line.
        logging.getLogger("coterie").setLevel(logging.INFO)
        # A thread that waits for Python's lock gets it after this time; requests and the gallery's upkeep share it.
        sys.setswitchinterval(SWITCH_SECONDS)
        settings = Settings.from_environment()

        safety = app.state.safety = Safety(settings)

        def open_bundle(path: Path) -> Bundle:
            return Bundle.open(path, device=settings.device, threads=settings.threads, side_by_side=True)

        def load(bundle: Bundle) -> Engine:
            return Engine(
                bundle,
                state=settings.state,
                store=settings.store,
                index=settings.index,
                limits=settings.limits,
                observer=safety.measures,
            )

        configured = open_bundle(find_bundle(settings.bundle))
        bundle = bundle_to_serve(configured, settings.state, open_bundle)
        self.served = app.state.served = Served(load(bundle))
        self.swapper = app.state.swapper = Swapper(
            self.served,
            configured.manifest,
            settings.state,
            open_bundle=open_bundle,
            load=load,
            bundles=settings.bundles,
        )
        self.swapper.start()
        safety.watch(self.served)
        # What is there now stays. To look through all of it for garbage would hold up every request for 0.1 seconds.
        gc.collect()
        gc.freeze()
        logger.info("serving %s (%s)", bundle.manifest.name, bundle.manifest.id)

    async def __is_ready__(self) -> bool:
        with self.served.held() as engine:
            return await engine.ready()

    @bentoml.on_deployment
    @staticmethod
    def check() -> None:
        """End the process with one line, before there are workers, if they could not start.

        A worker that fails is started again for ever.
        """
        try:
            settings = Settings.from_environment()
            path = find_bundle(settings.bundle)
            configured = Bundle.open(path, device="cpu")
            end_older_swap(configured, settings.state)
            bundle = bundle_to_serve(configured, settings.state, lambda other: Bundle.open(other, device="cpu"))
            _try_device(settings.device, bundle)
            bundle.gallery(settings.state, options=settings.store).close()
            check_safety(settings)
        except (CoterieError, OSError) as error:
            print(f"coterie: {error}", file=sys.stderr)
            sys.exit(CoterieError.exit_code)
        # Whatever is pushed to the model store meanwhile, all workers serve the one that was checked.
        os.environ["COTERIE_BUNDLE"] = str(path)
        metrics_folder(settings)
        _look_after_workers()

    @bentoml.on_shutdown
    def close(self) -> None:
        self.swapper.close()
        self.served.close()
        app.state.safety.close()
        if traced():
            _send_spans()


# Around everything, BentoML's own routes too; the first is the outermost.
Coterie.add_asgi_middleware(
    Recorder, records=lambda: app.state.safety.records, journal=lambda: app.state.safety.journal
)
Coterie.add_asgi_middleware(Access, policy=lambda: app.state.safety.policy)
Coterie.add_asgi_middleware(Straight, application=app)
remove_time_limit()


def _look_after_workers() -> None:
    """Have this process see every few seconds whether its workers live; BentoML does every ten, and has no setting."""
    from circus.controller import Controller

    start = Controller.start

    def start_attentive(controller: Any) -> None:
        controller.check_delay = min(controller.check_delay, CHECK_SECONDS * 1000)
        start(controller)

    Controller.start = start_attentive


def _send_spans() -> None:
    """Send the spans that OpenTelemetry has gathered since it last did, for a worker's end comes without its own."""
    from bentoml._internal.configuration.containers import BentoMLContainer

    sending = threading.Thread(target=BentoMLContainer.tracer_provider.get().force_flush, daemon=True)
    sending.start()
    sending.join(FLUSH_SECONDS)


def _try_device(device: str, bundle: Bundle) -> None:
    """Load the encoder where it is to run.

    Raises:
        CoterieError: it cannot run there.
    """
    if device in ("auto", "cpu"):
        bundle.encoder  # noqa: B018  a cached property that loads
        return
    # In a process of its own, for this one would hold GPU memory as long as the service runs.
    script = "import sys; from coterie import Bundle; Bundle.open(sys.argv[1], device=sys.argv[2]).encoder"
    trial = subprocess.run(
        [sys.executable, "-c", script, str(bundle.path), device],
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
    )
    if trial.returncode:
        reason = trial.stderr.strip().rpartition("\n")[2].partition(": ")[2]
        raise DeviceError(reason or f"the encoder cannot be loaded on {device}")
