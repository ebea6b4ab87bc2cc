"""Where the service finds its bundle, and how a bundle gets into BentoML's model store.

In the store the bundle lies in a subfolder of the model's directory, for BentoML writes a file of its own beside it.
"""

import shutil
from pathlib import Path

from coterie.bundle import Bundle
from coterie.errors import BundleError
from coterie.files import write_text

__all__ = ["MODEL", "find_bundle", "push", "stored"]

MODEL = "coterie-bundle"
SUBFOLDER = "bundle"
VERSION_DIGITS = 12
BESIDE = Path(__file__).resolve().parent.parent / "bundle"


def find_bundle(chosen: Path | None, *, beside: Path = BESIDE) -> Path:
    """The bundle directory to serve: `chosen`, else `beside` this package, else the one last pushed.

    Raises:
        BundleError: there is none in any of these places.
    """
    if chosen is not None:
        return chosen
    if beside.exists():
        return beside
    pushed = stored("latest")
    if pushed is None:
        raise BundleError(
            "there is no bundle to serve: make one with `coterie export RUN --gallery DATA --out bundle`, "
            "or name one with COTERIE_BUNDLE"
        )
    return pushed


def push(bundle: Bundle) -> str:
    """Copy a bundle into BentoML's model store and make it the latest there; returns its tag.

    The version is the start of the bundle's id, so that pushing the same one again changes nothing else.

    Raises:
        BundleError: the bundle is damaged, or the store cannot be written.
    """
    import bentoml
    from bentoml.exceptions import BentoMLException

    bundle.verify()
    digits = bundle.manifest.id.removeprefix("sha256:")
    tag = f"{MODEL}:{digits[:VERSION_DIGITS]}"
    try:
        there = stored(digits[:VERSION_DIGITS])
        if there is None or not _is_sound(there):
            _discard(tag)
            with bentoml.models.create(tag, metadata={"name": bundle.manifest.name, "id": bundle.manifest.id}) as model:
                shutil.copytree(bundle.path, model.path_of(SUBFOLDER))
        # BentoML goes by the time of creation, and would leave an older one that is pushed again behind the newest.
        write_text(Path(bentoml.models.get(tag).path).parent / "latest", digits[:VERSION_DIGITS])
    except (BentoMLException, OSError) as error:
        raise BundleError(f"{tag} cannot be put into BentoML's model store: {error}") from error
    return tag


def stored(version: str) -> Path | None:
    """The bundle directory of a version in BentoML's model store, or of `latest`; None if there is none."""
    # BentoML takes seconds to import, and a service that is told its bundle's path needs no model store.
    import bentoml
    from bentoml.exceptions import BentoMLException

    try:
        return Path(bentoml.models.get(f"{MODEL}:{version}").path) / SUBFOLDER
    except BentoMLException:  # not there, or left half-written by a push that was killed
        return None


def _is_sound(path: Path) -> bool:
    try:
        Bundle.open(path)
    except BundleError:
        return False
    return True


def _discard(tag: str) -> None:
    import bentoml
    from bentoml.exceptions import BentoMLException

    try:
        bentoml.models.delete(tag)
    except BentoMLException:
        return
