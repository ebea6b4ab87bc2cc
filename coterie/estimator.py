"""The classifier in scikit-learn's conventions, for vectors of one's own.

It stands on the functions that serve a bundle.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from coterie.calibration import FALSE_REJECT_RATES
from coterie.calibration import fit as calibrate
from coterie.classifier import Scores, score
from coterie.clusters import ClassClusters
from coterie.likelihood import NEIGHBORS
from coterie.reference import LabelledVectors

__all__ = ["CoterieClassifier"]


class CoterieClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Neighbours and class clusters by cosine similarity, with calibrated probabilities and an honest "unknown".

    Vectors need not be of unit length; only their direction counts.

    Parameters:
        n_neighbors: how many neighbours vote; None chooses by likelihood on the rows held out.
        held_out: share of each class's rows that calibrate and are not compared with, every so many in their order.
        false_reject: the share of known rows that may be called unknown: 0.01, 0.02, 0.05, 0.1 or 0.2.
        outlier_label: what `predict` says of unknown rows; None gives them the most probable label.

    Attributes:
        classes_: labels, sorted.
        n_features_in_: width of the vectors.
        calibration_: what was fitted, a coterie.classifier.Calibration.
        reference_: what queries are compared with, a coterie.reference.LabelledVectors; its classes are the numbers of
            `classes_`.
        indices_: which rows of `fit`'s X these are.

    >>> X = [[1, 0.1], [1, 0], [1, -0.1], [0, 1], [0.1, 1], [-0.1, 1]] * 3
    >>> model = CoterieClassifier(outlier_label="neither").fit(X, ["right", "right", "right", "up", "up", "up"] * 3)
    >>> model.predict([[2, 0.1], [0, 0.5], [-1, -1]]).tolist()
    ['right', 'up', 'neither']
    """

    def __init__(
        self,
        n_neighbors: int | None = None,
        *,
        held_out: float = 0.2,
        false_reject: float = 0.05,
        outlier_label: Any = None,
    ) -> None:
        self.n_neighbors = n_neighbors
        self.held_out = held_out
        self.false_reject = false_reject
        self.outlier_label = outlier_label

    def fit(self, X: ArrayLike, y: ArrayLike) -> "CoterieClassifier":  # noqa: N803  scikit-learn's name
        """Place the clusters of all classes and calibrate.

        Args:
            X: vectors (n, d), none of them zero.
            y: their labels (n,).

        Raises:
            ValueError: these or the parameters are not as described, or no class has rows to spare.
        """
        self._check_parameters()
        checked, labels = validate_data(self, X, y)
        check_classification_targets(labels)
        vectors = _directions(checked)
        self.classes_, numbers = np.unique(labels, return_inverse=True)
        spared = _every_so_many(numbers, self.held_out)
        if not spared.any():
            raise ValueError(
                f"n_samples={len(labels)} in {len(self.classes_)} classes leave none to calibrate with: "
                f"give a class at least {round(1 / self.held_out)} rows, or a larger held_out"
            )
        # The core's classes have names, and are sorted by them.
        names = np.char.zfill(numbers.astype(np.str_), 9)
        held_out = vectors[spared], names[spared]
        self.indices_ = np.flatnonzero(~spared)
        self.reference_ = LabelledVectors(
            vectors[~spared], numbers[~spared], ClassClusters.fit(vectors[~spared], names[~spared], held_out)
        )
        neighbors = NEIGHBORS if self.n_neighbors is None else (self.n_neighbors,)
        self.calibration_ = calibrate(self.reference_, *held_out, neighbors=neighbors)
        return self

    def predict(self, X: ArrayLike) -> NDArray[Any]:  # noqa: N803
        """The label of each vector, (n,); `outlier_label`, if there is one, for those of no known class."""
        scores = self._scores(X)
        labels = self.classes_[scores.best]
        if self.outlier_label is None:
            return np.asarray(labels)
        known = scores.accepted(self.calibration_.limit(self.false_reject))
        kind = np.result_type(labels, np.asarray(self.outlier_label))
        return np.where(known, labels.astype(kind), np.asarray(self.outlier_label, dtype=kind))

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:  # noqa: N803
        """The probability of each of `classes_`, (n, c), among the known ones."""
        return self._scores(X).probabilities

    def kneighbors(
        self,
        X: ArrayLike | None = None,  # noqa: N803
        n_neighbors: int | None = None,
        return_distance: bool = True,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]] | NDArray[np.int64]:
        """The nearest rows of `fit`'s X that were not held out, nearest first.

        Args:
            X: vectors (n, d); without, each of those rows is asked for its neighbours other than itself.
            n_neighbors: how many; by default as many as vote.

        Returns:
            Distances, 1 − cosine, and numbers of rows in `fit`'s X; both (n, k).
        """
        check_is_fitted(self)
        k = self.calibration_.n_neighbors if n_neighbors is None else n_neighbors
        reference = self.reference_
        if X is None:
            similarities, rows = reference.index.search(reference.embeddings, k + 1)
            # Itself last: of many that are equal it need not be the first, or found at all.
            order = np.argsort(rows == np.arange(len(rows))[:, None], axis=1, kind="stable")[:, : min(k, len(rows) - 1)]
            similarities, rows = np.take_along_axis(similarities, order, 1), np.take_along_axis(rows, order, 1)
        else:
            similarities, rows = reference.index.search(self._checked(X), k)
        found = self.indices_[rows]
        return (1 - similarities, found) if return_distance else found

    def _check_parameters(self) -> None:
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}: give a share between 0 and 1")
        if self.n_neighbors is not None and self.n_neighbors < 1:
            raise ValueError(f"n_neighbors is {self.n_neighbors}: ask for at least one neighbour")
        if self.false_reject not in FALSE_REJECT_RATES:
            rates = ", ".join(f"{rate:g}" for rate in FALSE_REJECT_RATES)
            raise ValueError(f"false_reject is {self.false_reject}: choose one of {rates}")

    def _scores(self, X: ArrayLike) -> Scores:  # noqa: N803
        check_is_fitted(self)
        return score(self._checked(X), self.reference_, self.calibration_)

    def _checked(self, X: ArrayLike) -> NDArray[np.float32]:  # noqa: N803
        return _directions(validate_data(self, X, reset=False))


def _directions(vectors: NDArray[Any]) -> NDArray[np.float32]:
    """The vectors (n, d) brought to unit length."""
    vectors = vectors.astype(np.float64)
    largest = np.abs(vectors).max(axis=1, keepdims=True)
    zero = np.flatnonzero(largest == 0)
    if len(zero):
        raise ValueError(f"row {zero[0]} of X is zero and has no direction: leave it out")
    vectors = vectors / largest  # whose squares neither overflow nor vanish
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


def _every_so_many(numbers: NDArray[np.int64], share: float) -> NDArray[np.bool_]:
    """Which rows to hold out, (n,): of each class ⌊share · rows⌋, evenly through it."""
    chosen = np.zeros(len(numbers), dtype=bool)
    for number in range(numbers.max() + 1):
        rows = np.flatnonzero(numbers == number)
        chosen[rows] = np.diff(np.floor(np.arange(len(rows) + 1) * share + 1e-9)) > 0
    return chosen
