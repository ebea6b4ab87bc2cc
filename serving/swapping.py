"""Another bundle in place of the one that is served, without a request that fails, in every worker.

The worker that is asked loads and warms up the new one beside the old, writes the pointer, and swaps. The others look
at the pointer every second and do the same. What cannot be loaded is not swapped in, and the old one goes on.
"""

import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path

from coterie.bundle import Bundle, Manifest
from coterie.errors import BundleError, CoterieError, StoreError
from serving.engine import Engine
from serving.errors import BundleRefusedError, ConflictError
from serving.model_store import MODEL, stored
from serving.pointer import Pointer, pointer_file, read_pointer, write_pointer
from serving.served import Served

__all__ = ["Swapper"]

logger = logging.getLogger("coterie.serving")

# How soon a worker sees that another one has swapped, and tries again if it could not follow.
SECONDS, SECONDS_AFTER_FAILURE = 1.0, 30.0
VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class Swapper:
    """Puts other bundles in charge.

    Args:
        served: whose engine is replaced.
        configured: manifest of the bundle that the operator named.
        state: folder of the gallery's changes, and of the pointer.
        open_bundle, load: make a verified bundle of a directory, and an engine, warmed up, of a bundle.
        bundles: folder below which bundles may be named by path; None for by no path.
    """

    def __init__(
        self,
        served: Served,
        configured: Manifest,
        state: Path,
        *,
        open_bundle: Callable[[Path], Bundle],
        load: Callable[[Bundle], Engine],
        bundles: Path | None = None,
    ) -> None:
        self._served, self._configured, self._bundles = served, configured, bundles
        self._open, self._load = open_bundle, load
        self.file = pointer_file(state, configured.name)
        self._seen: tuple[int, ...] | None = None
        self._loading = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_following, name="follow-swaps", daemon=True)

    def swap(self, named: str) -> tuple[Manifest, Manifest]:
        """Serve another bundle; takes as long as it loads. When this returns, the pointer survives a power cut.

        Args:
            named: a tag `coterie-bundle:VERSION` of BentoML's model store, or a path below the bundles' folder.

        Returns:
            The manifests of the bundle that was served before and of the new one.

        Raises:
            BundleRefusedError: there is no such bundle, or it cannot be served here; the old one goes on.
            ConflictError: another one is being loaded.
            StoreError: the gallery or the pointer cannot be used.
        """
        if not self._loading.acquire(blocking=False):
            raise ConflictError("another bundle is being loaded: ask again when that is done")
        try:
            before = self._served.engine.manifest
            path = self._find(named)
            try:
                bundle = self._open(path)
                self._check_name(bundle)
                # The same one is not loaded again, though another worker may be about to leave it.
                engine = None if bundle.manifest.id == before.id else self._load(bundle)
            except StoreError:
                raise
            except CoterieError as error:
                raise _refused(named, str(error).replace(str(path), named)) from error
            except Exception as error:
                logger.exception("the bundle %s cannot be loaded", path)
                raise _refused(named, "it cannot be loaded here, and the service's log says why") from error
            try:
                write_pointer(self.file, Pointer(configured=self._configured.id, bundle=path, id=bundle.manifest.id))
            except StoreError:
                if engine is not None:
                    engine.close()
                raise
            self._put(engine)
            return before, bundle.manifest
        finally:
            self._loading.release()

    def follow(self) -> None:
        """Serve what another worker has swapped in, if one has.

        Raises:
            CoterieError: it cannot be served here.
        """
        signature = _signature(self.file)
        if signature == self._seen:
            return
        with self._loading:
            pointer = read_pointer(self.file)
            if (
                pointer is not None
                and pointer.configured == self._configured.id
                and pointer.id != self._served.engine.manifest.id
            ):
                bundle = pointer.open(self._open)
                self._check_name(bundle)
                self._put(self._load(bundle))
        self._seen = signature

    def start(self) -> None:
        """Follow the other workers from now on, in a thread."""
        self._thread.start()

    def close(self) -> None:
        """Follow no more."""
        self._stop.set()

    def _keep_following(self) -> None:
        seconds = SECONDS
        while not self._stop.wait(seconds):
            seconds = SECONDS
            try:
                self.follow()
            except Exception:  # whatever it is, the old bundle goes on, and the thread
                logger.exception("another worker's bundle cannot be served here; trying again")
                seconds = SECONDS_AFTER_FAILURE

    def _put(self, engine: Engine | None) -> None:
        if engine is None:
            return
        if self._stop.is_set():  # nobody would close it
            engine.close()
            return
        self._served.replace(engine)
        logger.info("serving %s (%s)", engine.manifest.name, engine.manifest.id)

    def _check_name(self, bundle: Bundle) -> None:
        if bundle.manifest.name != self._configured.name:
            raise BundleError(
                f"it is of the gallery {bundle.manifest.name!r}, and what was enrolled here belongs to "
                f"{self._configured.name!r}: start a service of its own for it, or export it with --name"
            )

    def _find(self, named: str) -> Path:
        model, colon, version = named.partition(":")
        if colon and model == MODEL:
            path = stored(version) if VERSION.fullmatch(version) else None
            if path is None:
                raise _refused(named, "the model store has no such tag")
            return path
        if self._bundles is None:
            raise _refused(named, f"name a tag {MODEL}:VERSION; paths are taken where COTERIE_BUNDLES names a folder")
        try:
            folder = self._bundles.resolve()
            path = (folder / named).resolve()
        except (OSError, ValueError, RuntimeError) as error:  # a null character, a loop of links
            raise _refused(named, "it is no path") from error
        if folder not in path.parents:
            raise _refused(named, "the path does not lead below COTERIE_BUNDLES")
        return path


def _refused(named: str, reason: str) -> BundleRefusedError:
    return BundleRefusedError(f"{named[:200]!r} was not swapped in: {reason}", param="bundle")


def _signature(file: Path) -> tuple[int, ...] | None:
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
