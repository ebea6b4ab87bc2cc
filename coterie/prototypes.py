"""Where the prototypes of one class lie, and how many it needs: spherical k-means (Dhillon and Modha, 2001).

Knows unit vectors of one class. Nothing here is random, so equal members give equal prototypes.
"""

import math
from collections.abc import Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray

__all__ = ["SMALLEST_GAP", "gaps", "nearest_prototypes", "place", "prototype"]

# Keeps the logarithm of a gap finite; the similarity of two float32 unit vectors is good to about 1e-6.
SMALLEST_GAP = 1e-3
# Another prototype must shorten the typical gap of unseen members by a quarter. Halving a round cloud of d dimensions
# shortens it by the share 2/(πd), which is less from three on; a class of two looks gains more.
WORTHWHILE = 0.75
MOST_PROTOTYPES = 4
# Of fewer members a prototype would be no typical look but an odd picture.
FEWEST_MEMBERS = 3
ROUNDS = 20
FOLDS = 5
# So many members, evenly chosen, tell how many prototypes are worthwhile, and about where.
MOST_COMPARED = 128
# Below this elongation another prototype is not tried. Of 525 mixed clouds of 8 to 128 members in 8 to 128 dimensions
# that a second prototype served, the least elongated had 0.11 and all but three more than 0.15.
ROUND = 0.15


def gaps(similarities: NDArray[np.floating]) -> NDArray[np.float64]:
    """1 − similarity, kept above the precision of float32."""
    return np.maximum(1 - np.asarray(similarities, dtype=np.float64), SMALLEST_GAP)


def prototype(members: NDArray[np.float32]) -> NDArray[np.float32]:
    """The normalised mean (d,) of unit vectors (m, d); of opposite vectors that cancel, the first."""
    mean = members.mean(axis=0, dtype=np.float64)
    length = np.linalg.norm(mean)
    direction = mean / length if length > 1e-6 else members[0]
    return np.asarray(direction, dtype=np.float32)


def place(
    members: NDArray[np.float32], unseen: NDArray[np.float32] | None = None, *, least: int = 1
) -> NDArray[np.float32]:
    """The prototypes (p, d) of a class: as many as shorten the typical gap of images they have not seen.

    Args:
        members: unit vectors (m, d), m at least 1.
        unseen: others of the class, (u, d). Without them every fifth member in turn is held against prototypes of the
            other four fifths.
        least: how many prototypes the class is known to need; it gets them if its members suffice.
    """
    some = members[:: -(-len(members) // MOST_COMPARED)]
    *_, placed = islice(_growing(some), _worthwhile(some, unseen, least))
    owners = nearest_prototypes(members, placed)
    return np.stack([prototype(members[owners == row]) if row in owners else placed[row] for row in range(len(placed))])


def nearest_prototypes(vectors: NDArray[np.float32], prototypes: NDArray[np.float32]) -> NDArray[np.int64]:
    """The row of each vector's (n, d) most similar prototype, (n,)."""
    return np.asarray((vectors @ prototypes.T).argmax(axis=1))


def _worthwhile(members: NDArray[np.float32], unseen: NDArray[np.float32] | None, least: int) -> int:
    """How many prototypes are worth having, from `least` on."""
    if unseen is None or not len(unseen):
        if least == 1 and _elongation(members) < ROUND:
            return 1
        unseen = None
    chosen, shortest = least, math.inf
    for count, typical in enumerate(_typical_gaps(members, unseen), 1):
        if count > least and typical >= WORTHWHILE * shortest:
            break
        chosen, shortest = max(count, least), typical
    return chosen


def _elongation(members: NDArray[np.float32]) -> float:
    """How much the members' directions from their middle share an axis: 1 on a line, about 1.5/d in a round cloud.

    An upper bound of the largest eigenvalue λ of the directions' second moment. Two prototypes lie on a line through
    the middle, which brings no member nearer than its distance from that line: with cosines c to the axis the typical
    gap falls to exp(mean log(1 − c²)) at best, and the mean of c² is at most λ.
    """
    offsets = members - members.mean(axis=0)
    directions = offsets / np.maximum(np.linalg.norm(offsets, axis=1, keepdims=True), 1e-9)
    moment = directions @ directions.T / len(members)  # (m, m), with the eigenvalues of the (d, d) one
    return float(np.sqrt(np.linalg.norm(moment @ moment)))  # (Σ λ⁴)^¼


def _typical_gaps(members: NDArray[np.float32], unseen: NDArray[np.float32] | None) -> Iterator[float]:
    """The geometric mean gap of unseen members to the nearest of one prototype, of two, …"""
    folds = np.arange(len(members)) % FOLDS
    if unseen is not None:
        parts = [(members, unseen)]
    elif len(members) > 1:
        parts = [(members[folds != fold], members[folds == fold]) for fold in range(min(FOLDS, len(members)))]
    else:
        return
    for placed in zip(*(_growing(seen) for seen, _ in parts), strict=False):
        log_gaps = [np.log(gaps((held @ p.T).max(axis=1))) for p, (_, held) in zip(placed, parts, strict=True)]
        yield float(np.exp(np.concatenate(log_gaps).mean()))


def _growing(members: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """One prototype, then two, … for as long as each has enough members.

    The cluster with the largest sum of gaps is cut across its longest axis, and all settle anew.
    """
    prototypes: NDArray[np.float32] = prototype(members)[None]
    owners = np.zeros(len(members), dtype=np.int64)
    while True:
        yield prototypes
        if len(prototypes) == MOST_PROTOTYPES:
            return
        widest = np.bincount(owners, weights=gaps(np.einsum("md,md->m", members, prototypes[owners]))).argmax()
        owners = np.where((owners == widest) & _beyond(members, members[owners == widest]), len(prototypes), owners)
        owners = _settled(members, owners)
        if np.bincount(owners, minlength=len(prototypes) + 1).min() < FEWEST_MEMBERS:
            return
        prototypes = _means(members, owners)


def _settled(members: NDArray[np.float32], owners: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each member's cluster once all belong to the one whose prototype is nearest."""
    for _ in range(ROUNDS):
        if np.bincount(owners).min() == 0:
            break
        before, owners = owners, nearest_prototypes(members, _means(members, owners))
        if (owners == before).all():
            break
    return owners


def _means(members: NDArray[np.float32], owners: NDArray[np.int64]) -> NDArray[np.float32]:
    return np.stack([prototype(members[owners == row]) for row in range(owners.max() + 1)])


def _beyond(members: NDArray[np.float32], cluster: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which members (m,) lie beyond the middle of `cluster` along its longest axis, found by the power method."""
    middle = cluster.mean(axis=0, dtype=np.float64)
    centred = cluster - middle
    axis = centred[np.einsum("md,md->m", centred, centred).argmax()]
    for _ in range(ROUNDS):
        axis = centred.T @ (centred @ axis)
        axis /= max(float(np.linalg.norm(axis)), 1e-12)
    return np.asarray((members - middle) @ axis > 0)
