"""Class clusters: where each class lies and how far it reaches.

A cluster is its class's prototype, the normalised mean of its members, with a radius: the typical gap, 1 − similarity,
between the prototype and a member that did not help to place it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["ClassClusters", "cluster_similarities", "gaps", "left_out_gaps", "left_out_radii", "prototype"]

# Keeps the logarithm of a gap finite; the similarity of two float32 unit vectors is good to about 1e-6.
SMALLEST_GAP = 1e-3
# How many members' worth of evidence the typical radius of all classes counts for against a class's own.
PRIOR_MEMBERS = 5.0
# The cluster of a class enrolled later ends where this share of the other classes' items would begin to fall in. For
# scikit-learn's digits (five examples, three seeds of twenty draws) the new class's label is then given to 0.21 instead
# of 0.40 of the images of another, unknown digit; right and accepted answers fall from 0.87 to 0.80.
STRANGERS_WITHIN = 0.2
WIDEST_GAP = 2.0


@dataclass(frozen=True)
class ClassClusters:
    """The clusters of all classes of a gallery.

    Attributes:
        labels: class names, sorted; (c,).
        prototypes: float32 (c, d), unit length.
        radii: float32 (c,), typical gap of a member that the prototype has not seen.
        counts: int64 (c,), gallery items of each class.
        bounds: float32 (c,), the gap beyond which nothing is accepted; no bound (2) for the classes that the limits
            were calibrated on.
    """

    labels: tuple[str, ...]
    prototypes: NDArray[np.float32]
    radii: NDArray[np.float32]
    counts: NDArray[np.int64]
    bounds: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def fit(
        cls,
        embeddings: NDArray[np.float32],
        labels: NDArray[np.str_],
        held_out: tuple[NDArray[np.float32], NDArray[np.str_]] | None = None,
    ) -> "ClassClusters":
        """Place a cluster for every label.

        Args:
            embeddings, labels: the gallery, (n, d) and (n,).
            held_out: embeddings and labels of images that neither the encoder nor the gallery has seen; radii are
                taken from them. Without, or for a class they lack, each member is held against the others.
        """
        names = tuple(sorted(set(labels.tolist())))
        prototypes = np.stack([prototype(embeddings[labels == name]) for name in names])
        log_gaps: list[NDArray[np.float64]] = []
        for row, name in enumerate(names):
            own = embeddings[labels == name]
            unseen = held_out[0][held_out[1] == name] if held_out else own[:0]
            found = gaps(unseen @ prototypes[row]) if len(unseen) else left_out_gaps(own)
            log_gaps.append(np.log(found))
        owners = np.repeat(np.arange(len(names)), [len(found) for found in log_gaps])
        return cls(
            labels=names,
            prototypes=prototypes,
            radii=shrunken_radii(np.concatenate(log_gaps), owners, len(names)),
            counts=np.asarray([np.count_nonzero(labels == name) for name in names], dtype=np.int64),
            bounds=np.full(len(names), WIDEST_GAP, dtype=np.float32),
        )

    def select(self, rows: Sequence[int]) -> "ClassClusters":
        """The clusters at `rows`, in that order."""
        keep = list(rows)
        return ClassClusters(
            tuple(self.labels[row] for row in keep),
            self.prototypes[keep],
            self.radii[keep],
            self.counts[keep],
            self.bounds[keep],
        )

    def thresholds(self, limit: float) -> NDArray[np.float64]:
        """The least similarity to each cluster, (c,), at a deviation of at most `limit`."""
        reach = self.radii.astype(np.float64) * np.exp(limit)
        return np.asarray(1 - np.minimum(reach, self.bounds))

    def with_class(self, label: str, members: NDArray[np.float32], strangers: NDArray[np.float32]) -> "ClassClusters":
        """These clusters with the one of `label` placed anew; without members it is removed.

        Args:
            members: embeddings (m, d) of the class.
            strangers: embeddings of all other classes' items.

        A class that had a cluster keeps its radius unless the members now reach farther: they may be images that the
        encoder was trained on, which lie closer than any new one.
        """
        rest = [row for row, name in enumerate(self.labels) if name != label]
        others = self.select(rest)
        if not len(members):
            return others
        log_gaps = np.log(left_out_gaps(members))
        # A young class may be far wider than those the encoder was trained on, so its own members decide; only a
        # single example leaves nothing to measure, and then the widest known cluster is the best guess.
        before = np.asarray([name == label for name in self.labels], dtype=bool)
        known = self.radii[before].max(initial=0)
        own = np.exp(log_gaps.mean()) if len(log_gaps) else known or self.radii.max(initial=SMALLEST_GAP)
        centre = prototype(members)
        bound = self.bounds[before].max(initial=0)
        if not bound:
            bound = np.quantile(gaps(strangers @ centre), STRANGERS_WITHIN) if len(strangers) else WIDEST_GAP
        joined = ClassClusters(
            labels=(*others.labels, label),
            prototypes=np.concatenate([others.prototypes, centre[None]]),
            radii=np.append(others.radii, np.float32(max(known, own))),
            counts=np.append(others.counts, len(members)),
            bounds=np.append(others.bounds, np.float32(bound)),
        )
        return joined.select(np.argsort(joined.labels).tolist())


def prototype(members: NDArray[np.float32]) -> NDArray[np.float32]:
    """The normalised mean (d,) of unit vectors (m, d); of opposite vectors that cancel, the first."""
    mean = members.mean(axis=0, dtype=np.float64)
    length = np.linalg.norm(mean)
    direction = mean / length if length > 1e-6 else members[0]
    return np.asarray(direction, dtype=np.float32)


def cluster_similarities(embeddings: NDArray[np.float32], clusters: ClassClusters) -> NDArray[np.float32]:
    """Cosine of each embedding (n, d) to each class's prototype, (n, c)."""
    return np.asarray(embeddings @ clusters.prototypes.T)


def gaps(similarities: NDArray[np.floating]) -> NDArray[np.float64]:
    """1 − similarity, kept above the precision of float32."""
    return np.maximum(1 - np.asarray(similarities, dtype=np.float64), SMALLEST_GAP)


def left_out_gaps(members: NDArray[np.float32]) -> NDArray[np.float64]:
    """The gap of each member (m, d) to the prototype of all the others; empty for fewer than two members."""
    if len(members) < 2:
        return np.empty(0)
    rest = members.sum(axis=0, dtype=np.float64) - members
    lengths = np.maximum(np.linalg.norm(rest, axis=1), 1e-12)
    return gaps(np.einsum("md,md->m", members, rest) / lengths)


def shrunken_radii(log_gaps: NDArray[np.float64], owners: NDArray[np.int64], n_classes: int) -> NDArray[np.float32]:
    """Geometric mean gap of each class, (c,), drawn towards that of all classes where members are few.

    Args:
        log_gaps, owners: logarithm of a member's gap, and the row of its class; both (m,).
    """
    sums, counts, typical = _sums(log_gaps, owners, n_classes)
    return np.exp((sums + PRIOR_MEMBERS * typical) / (counts + PRIOR_MEMBERS)).astype(np.float32)


def left_out_radii(log_gaps: NDArray[np.float64], owners: NDArray[np.int64], n_classes: int) -> NDArray[np.float32]:
    """For each member the radius, (m,), that its class would have had without it; arguments as `shrunken_radii`."""
    sums, counts, typical = _sums(log_gaps, owners, n_classes)
    rest, others = sums[owners] - log_gaps, counts[owners] - 1
    return np.exp((rest + PRIOR_MEMBERS * typical) / (others + PRIOR_MEMBERS)).astype(np.float32)


def _sums(
    log_gaps: NDArray[np.float64], owners: NDArray[np.int64], n_classes: int
) -> tuple[NDArray[np.float64], NDArray[np.int64], float]:
    typical = float(log_gaps.mean()) if len(log_gaps) else float(np.log(SMALLEST_GAP))
    sums = np.bincount(owners, weights=log_gaps, minlength=n_classes)
    return sums.astype(np.float64), np.bincount(owners, minlength=n_classes).astype(np.int64), typical
