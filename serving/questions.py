"""What can be asked of the gallery about embeddings. Requests that ask the same are answered together."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from coterie.classifier import Calibration, Classification, Verification, classify, verify
from coterie.errors import CoterieError
from coterie.gallery import Neighbor, Snapshot
from coterie.metadata import as_text
from serving.errors import BadRequestError, NotFoundError

__all__ = ["Classify", "Found", "Question", "Search", "Verify"]


class Question(Protocol):
    """A question; equal ones get equal answers."""

    def __hash__(self) -> int: ...

    def check(self, calibration: Calibration) -> None:
        """Refuse what no gallery could answer.

        Raises:
            BadRequestError: no threshold was fitted for the false-reject rate.
        """

    def answers(self, embeddings: NDArray[np.float32], snapshot: Snapshot, calibration: Calibration) -> Sequence[Any]:
        """One answer for each embedding (n, d).

        Raises:
            NotFoundError: the gallery lacks a class that is asked about, or has none.
        """


@dataclass(frozen=True)
class Classify:
    """Which class, or none; see `coterie.classifier.classify`.

    Attributes:
        k: how many nearest items vote, None for as many as the calibration was fitted with. With another number the
            probabilities are not calibrated, and the answers' calibration has another id.
    """

    false_reject: float = 0.05
    top: int = 5
    neighbors: int = 5
    k: int | None = None

    def check(self, calibration: Calibration) -> None:
        _check_rate(calibration, self.false_reject)

    def answers(
        self, embeddings: NDArray[np.float32], snapshot: Snapshot, calibration: Calibration
    ) -> list[Classification]:
        if not len(snapshot.clusters):
            raise NotFoundError("the gallery is empty: add examples of a class first")
        if self.k is not None:
            calibration = calibration.model_copy(update={"n_neighbors": self.k})
        return classify(
            embeddings,
            snapshot,
            calibration,
            false_reject=self.false_reject,
            top=self.top,
            neighbors=self.neighbors,
        )


@dataclass(frozen=True)
class Found:
    """The nearest gallery items of one image, and the gallery's last change."""

    neighbors: list[Neighbor]
    snapshot: int


@dataclass(frozen=True)
class Search:
    """Which items are nearest; see `coterie.snapshot.Snapshot.search`.

    Attributes:
        labels: only items of these classes; of all without any.
        metadata: only items with all these values, as key and JSON.
    """

    k: int = 10
    labels: tuple[str, ...] = ()
    metadata: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, k: int, labels: Sequence[str], metadata: Mapping[str, Any]) -> "Search":
        # As text, for 1 and true are equal in Python and not in a gallery.
        return cls(k, tuple(labels), tuple(sorted((key, as_text(value)) for key, value in metadata.items())))

    def check(self, calibration: Calibration) -> None:
        return

    def answers(self, embeddings: NDArray[np.float32], snapshot: Snapshot, calibration: Calibration) -> list[Found]:
        for label in self.labels:
            _check_class(snapshot, label)
        found = snapshot.search(
            embeddings,
            self.k,
            labels=self.labels or None,
            metadata={key: json.loads(value) for key, value in self.metadata},
        )
        return [Found(neighbors, snapshot.sequence) for neighbors in found]


@dataclass(frozen=True)
class Verify:
    """Whether it is of one class; see `coterie.classifier.verify`."""

    label: str
    false_reject: float = 0.05

    def check(self, calibration: Calibration) -> None:
        _check_rate(calibration, self.false_reject)

    def answers(
        self, embeddings: NDArray[np.float32], snapshot: Snapshot, calibration: Calibration
    ) -> list[Verification]:
        _check_class(snapshot, self.label)
        return verify(embeddings, snapshot, calibration, self.label, false_reject=self.false_reject)


def _check_rate(calibration: Calibration, false_reject: float) -> None:
    try:
        calibration.limit(false_reject)
    except CoterieError as error:
        raise BadRequestError(str(error), param="false_reject") from error


def _check_class(snapshot: Snapshot, label: str) -> None:
    if label not in snapshot.clusters.labels:
        raise NotFoundError(f"the gallery has no class {label[:200]!r}: GET /v1/classes lists them", param="label")
