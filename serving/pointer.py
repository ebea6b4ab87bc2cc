"""Which bundle the workers of a service have agreed on: a small file beside the gallery's changes.

The file holds what was swapped in by request, and the id of the bundle that the operator had named when it was. Once
the operator names another one, or puts another one in its place, that is the newer word and the file says nothing.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from coterie.bundle import Bundle
from coterie.errors import BundleError, StoreError
from coterie.files import write_text

__all__ = ["Pointer", "bundle_to_serve", "end_older_swap", "pointer_file", "read_pointer", "write_pointer"]

logger = logging.getLogger("coterie.serving")


class Pointer(BaseModel):
    """A swap.

    Attributes:
        configured: id of the bundle that the operator had named.
        bundle: the directory of the one that is served instead.
        id: of that one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    configured: str
    bundle: Path
    id: str

    def open(self, open_bundle: Callable[[Path], Bundle]) -> Bundle:
        """The bundle that is pointed at.

        Raises:
            BundleError: it is damaged, gone, or another one.
        """
        bundle = open_bundle(self.bundle)
        if bundle.manifest.id != self.id:
            raise BundleError(f"{self.bundle} holds another bundle than was swapped in there")
        return bundle


def pointer_file(state: Path, name: str) -> Path:
    """Where the pointer of a gallery's service lies."""
    return state / name / "served.json"


def read_pointer(file: Path) -> Pointer | None:
    """The swap that was asked for last; None if there never was one.

    Raises:
        StoreError: the file cannot be read.
    """
    try:
        return Pointer.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise StoreError(f"{file}, which says what bundle to serve, cannot be read: remove it") from error


def write_pointer(file: Path, pointer: Pointer) -> None:
    """Replace the pointer; when this returns, it survives a power cut.

    Raises:
        StoreError: it cannot be written.
    """
    try:
        write_text(file, pointer.model_dump_json() + "\n")
    except OSError as error:
        raise StoreError(f"{file} cannot be written: {error.strerror or error}") from error


def end_older_swap(configured: Bundle, state: Path) -> None:
    """Forget what was swapped in before the operator named another bundle, so that naming the old one is not undone.

    Raises:
        StoreError: the file cannot be read or removed.
    """
    file = pointer_file(state, configured.manifest.name)
    pointer = read_pointer(file)
    if pointer is not None and pointer.configured != configured.manifest.id:
        logger.info("%s was swapped in before %s was named, and is not served", pointer.bundle, configured.path)
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"{file} cannot be removed: {error.strerror or error}") from error


def bundle_to_serve(configured: Bundle, state: Path, open_bundle: Callable[[Path], Bundle]) -> Bundle:
    """What a service begins with: the bundle that the operator named, or the one that took its place by request.

    Raises:
        BundleError: the bundle that was swapped in cannot be used any more; names the file to remove.
    """
    file = pointer_file(state, configured.manifest.name)
    pointer = read_pointer(file)
    if pointer is None or pointer.configured != configured.manifest.id:
        return configured
    try:
        return pointer.open(open_bundle)
    except BundleError as error:
        raise BundleError(f"{error}; remove {file} to serve {configured.path} again") from error
