"""Class clusters: where each class lies and how far it reaches.

A cluster is one or more prototypes, each with a radius: the typical gap, 1 − similarity, between the prototype and a
member that did not help to place it. Beside them stands the class's spacing, the typical gap between such a member and
the nearest of the class's items.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from coterie.prototypes import SMALLEST_GAP, gaps, nearest_prototypes, place

__all__ = ["ClassClusters", "left_out_gaps", "typical_gaps"]

# How many members' worth of evidence the typical gap of all classes counts for against a class's own.
PRIOR_MEMBERS = 5.0
# A class enrolled later ends where this share of the other classes' items would begin to fall in. For five examples of
# a class, seven encoders of digits and hand signs: 5 % of its new images are refused, and 26 instead of 44 % of those
# of other, unknown classes get its label.
STRANGERS_WITHIN = 0.2
# One example has no typical gap. That within which this share of the others' items lies serves best: of images of two
# new classes, 59 % get the right label, 46 % with the radius of the widest known class; known ones lose half a point.
STRANGERS_NEAR = 0.05
WIDEST_GAP = 2.0
# Of a similarity, as coterie.ranking has them.
DECIMALS = 6
# So many members, evenly chosen, tell a typical gap; so many strangers, where a twentieth of them begins.
MEMBERS_COMPARED, STRANGERS_COMPARED = 128, 500


@dataclass(frozen=True)
class ClassClusters:
    """The clusters of all classes of a gallery.

    Attributes:
        labels: class names, sorted; (c,).
        counts: int64 (c,), gallery items of each class.
        spacings: float32 (c,), typical gap between a member that is no item and the nearest item of the class.
        bounds: float32 (c, 2), the gaps to the cluster and to the nearest item beyond which nothing is accepted; none
            (2) for the classes that the limits were calibrated on.
        prototypes: float32 (p, d), unit length, in the order of their classes.
        owners: int64 (p,), the class of each prototype.
        radii: float32 (p,), typical gap of a member that the prototype has not seen.
    """

    labels: tuple[str, ...]
    counts: NDArray[np.int64]
    spacings: NDArray[np.float32]
    bounds: NDArray[np.float32]
    prototypes: NDArray[np.float32]
    owners: NDArray[np.int64]
    radii: NDArray[np.float32]

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
            held_out: embeddings and labels of images that neither the encoder nor the gallery has seen; the number of
                prototypes, radii and spacings are taken from them. Without, or for a class they lack, each member is
                held against the others.
        """
        names = tuple(sorted(set(labels.tolist())))
        placed = []
        for name in names:
            own = embeddings[labels == name]
            unseen = held_out[0][held_out[1] == name] if held_out else own[:0]
            prototypes = place(own, unseen)
            placed.append((len(own), prototypes, *_measured(own, prototypes, unseen)))
        counts, prototypes_of, to_prototype, nearest, to_item = zip(*placed, strict=True)
        owners = np.repeat(np.arange(len(names)), [len(prototypes) for prototypes in prototypes_of])
        first = np.searchsorted(owners, np.arange(len(names)))
        at = np.concatenate([rows + first[row] for row, rows in enumerate(nearest)])
        classes = np.repeat(np.arange(len(names)), [len(found) for found in to_item])
        return cls(
            labels=names,
            counts=np.asarray(counts, dtype=np.int64),
            spacings=typical_gaps(np.log(np.concatenate(to_item)), classes, len(names)),
            bounds=np.full((len(names), 2), WIDEST_GAP, dtype=np.float32),
            prototypes=np.concatenate(prototypes_of),
            owners=owners,
            radii=typical_gaps(np.log(np.concatenate(to_prototype)), at, len(owners)),
        )

    @classmethod
    def joined(cls, parts: Sequence["ClassClusters"]) -> "ClassClusters":
        """The clusters of all `parts`, none of which shares a label with another."""
        first = np.cumsum([0, *(len(part) for part in parts)])
        together = cls(
            labels=tuple(label for part in parts for label in part.labels),
            counts=np.concatenate([part.counts for part in parts]),
            spacings=np.concatenate([part.spacings for part in parts]),
            bounds=np.concatenate([part.bounds for part in parts]),
            prototypes=np.concatenate([part.prototypes for part in parts]),
            owners=np.concatenate([part.owners + start for part, start in zip(parts, first, strict=False)]),
            radii=np.concatenate([part.radii for part in parts]),
        )
        return together.select(sorted(range(len(together)), key=together.labels.__getitem__))

    def select(self, rows: Sequence[int]) -> "ClassClusters":
        """The clusters at `rows`, in that order."""
        keep = np.asarray(rows, dtype=np.int64)
        first, end = np.searchsorted(self.owners, [keep, keep + 1])  # where each one's prototypes are
        owners = np.repeat(np.arange(len(keep)), end - first)
        before = np.cumsum(end - first) - (end - first)
        at = np.arange(len(owners)) + (first - before)[owners]
        return ClassClusters(
            labels=tuple(map(self.labels.__getitem__, keep.tolist())),
            counts=self.counts[keep],
            spacings=self.spacings[keep],
            bounds=self.bounds[keep],
            prototypes=self.prototypes[at],
            owners=owners,
            radii=self.radii[at],
        )

    @property
    def enrolled(self) -> NDArray[np.bool_]:
        """Which classes came after the limits were calibrated, (c,)."""
        return np.asarray(self.bounds[:, 0] < WIDEST_GAP)

    @property
    def reaches(self) -> NDArray[np.float32]:
        """The radius of each class's widest prototype, (c,)."""
        return np.asarray(self._of_classes(self.radii[None])[0])

    def similarities(self, embeddings: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The cosine of each embedding (n, d) to each class's most similar prototype, and that one's radius; (n, c)."""
        # Single precision would depend on the other queries of a batch.
        exact = embeddings.astype(np.float64) @ self._exact_prototypes
        to_prototypes = np.round(exact, DECIMALS).astype(np.float32)
        if len(self.owners) == len(self):
            return to_prototypes, np.broadcast_to(self.radii, to_prototypes.shape)
        best = self._of_classes(to_prototypes)
        return best, self._of_classes(np.where(to_prototypes == best[:, self.owners], self.radii, 0))

    def with_class(self, label: str, members: NDArray[np.float32], strangers: NDArray[np.float32]) -> "ClassClusters":
        """These clusters with the one of `label` placed anew; without members it is removed. See `placed`."""
        others = self.select([row for row, name in enumerate(self.labels) if name != label])
        return ClassClusters.joined([others, self.placed(label, members, strangers)]) if len(members) else others

    def placed(self, label: str, members: NDArray[np.float32], strangers: NDArray[np.float32]) -> "ClassClusters":
        """The cluster of `label` alone, placed anew.

        Args:
            members: embeddings (m, d) of the class, in any order; m at least 1.
            strangers: embeddings of other classes' items, or of some, evenly chosen.

        A class that the limits were calibrated on keeps its number of prototypes, and its radii and spacing unless the
        members now reach farther: they may be images that the encoder was trained on, which lie closer than any new
        one. All others are as wide as their own members say.
        """
        before = self.select([row for row, name in enumerate(self.labels) if name == label])
        members = members[np.lexsort(members.T[:2])]
        strangers = strangers[:: -(-len(strangers) // STRANGERS_COMPARED) or 1]
        calibrated = len(before) > 0 and not before.enrolled[0]
        prototypes = place(members, least=len(before.prototypes) if calibrated else 1)
        owners = np.zeros(len(prototypes), dtype=np.int64)
        to_prototype, nearest, to_item = _measured(members, prototypes, members[:0])
        near: list[NDArray[np.float64]] = []
        if not calibrated or not len(to_item):  # strangers are compared where they decide something
            near = [
                gaps((strangers @ own.T).max(axis=1)) if len(strangers) else np.asarray([WIDEST_GAP])
                for own in (prototypes, members)
            ]
        if len(to_item):
            spacing = np.exp(np.log(to_item).mean())
            radii = typical_gaps(np.log(to_prototype), nearest, len(prototypes), prior=0)
        else:
            spacing = (
                np.quantile(near[1], STRANGERS_NEAR) if len(strangers) else self.spacings.max(initial=SMALLEST_GAP)
            )
            radii = np.asarray([spacing], dtype=np.float32)
        bounds = [WIDEST_GAP] * 2 if calibrated else [np.quantile(found, STRANGERS_WITHIN) for found in near]
        if calibrated:
            spacing = max(spacing, before.spacings[0])
            radii = np.maximum(radii, before.radii[nearest_prototypes(prototypes, before.prototypes)])
        return ClassClusters(
            labels=(label,),
            counts=np.asarray([len(members)], dtype=np.int64),
            spacings=np.asarray([spacing], dtype=np.float32),
            bounds=np.asarray([bounds], dtype=np.float32),
            prototypes=prototypes,
            owners=owners,
            radii=radii,
        )

    @cached_property
    def _exact_prototypes(self) -> NDArray[np.float64]:
        return self.prototypes.T.astype(np.float64)

    def _of_classes(self, of_prototypes: NDArray[np.float32]) -> NDArray[np.float32]:
        """The largest of each class's values; from (n, p) to (n, c)."""
        first = np.searchsorted(self.owners, np.arange(len(self)))
        return np.asarray(np.maximum.reduceat(of_prototypes, first, axis=1) if len(self) else of_prototypes)


def left_out_gaps(members: NDArray[np.float32], rows: slice = slice(None)) -> NDArray[np.float64]:
    """The gap of each member (m, d), or of those at `rows`, to the prototype of all others; empty for a lone member."""
    if len(members) < 2:
        return np.empty(0)
    some = members[rows]
    rest = members.sum(axis=0, dtype=np.float64) - some
    lengths = np.maximum(np.linalg.norm(rest, axis=1), 1e-12)
    return gaps(np.einsum("md,md->m", some, rest) / lengths)


def typical_gaps(
    log_gaps: NDArray[np.float64], owners: NDArray[np.int64], count: int, *, prior: float = PRIOR_MEMBERS
) -> NDArray[np.float32]:
    """Geometric mean gap of each owner, (count,), drawn towards that of all where members are few.

    Args:
        log_gaps, owners: logarithm of a member's gap, and the row of its class or prototype; both (m,).
        prior: how many members the gap of all counts for; an owner without members has that of all in any case.
    """
    typical = float(log_gaps.mean()) if len(log_gaps) else math.log(SMALLEST_GAP)
    sums = np.bincount(owners, weights=log_gaps, minlength=count)
    counts = np.bincount(owners, minlength=count)
    weights = np.where(counts > 0, prior, 1.0)
    return np.exp((sums + weights * typical) / (counts + weights)).astype(np.float32)


def _measured(
    members: NDArray[np.float32], prototypes: NDArray[np.float32], unseen: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """Of unseen members of a class: the gap to the nearest prototype, which that is, and the gap to the nearest item.

    Where none are given, each member is held against the others.
    """
    if len(unseen):
        to_prototypes = unseen @ prototypes.T
        return gaps(to_prototypes.max(axis=1)), to_prototypes.argmax(axis=1), gaps((unseen @ members.T).max(axis=1))
    owners = nearest_prototypes(members, prototypes)
    some = slice(None, None, -(-len(members) // MEMBERS_COMPARED))
    to_prototype = [left_out_gaps(members[owners == row], some) for row in range(len(prototypes))]
    nearest = np.repeat(np.arange(len(prototypes)), [len(found) for found in to_prototype])
    if len(members) < 2:
        return np.concatenate(to_prototype), nearest, np.empty(0)
    to_others = members[some] @ members.T
    to_others[np.arange(len(to_others)), np.arange(len(members))[some]] = -1
    return np.concatenate(to_prototype), nearest, gaps(to_others.max(axis=1))
