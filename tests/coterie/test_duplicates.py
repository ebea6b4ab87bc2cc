"""Nearly equal items, in blocks, against the comparison of every two."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest

from coterie import duplicates as duplicates_module
from coterie.duplicates import EDGES, find_duplicates
from coterie.items import GalleryItems


@pytest.fixture
def drawn(cloud_class: Any, items: Any) -> GalleryItems:
    """150 items of three narrow classes, some of them there twice."""
    clouds = cloud_class.make(np.random.default_rng(0), 3, 8, 0.2)
    embeddings, labels = clouds.draw(np.random.default_rng(1), [50, 50, 50])
    embeddings[100:110] = embeddings[:10]
    return items(embeddings, labels)


@pytest.fixture
def signs(items: Any) -> GalleryItems:
    """150 items whose similarities are multiples of an eighth, exactly so however they are computed."""
    rng = np.random.default_rng(0)
    return items(rng.choice(np.float32([0.25, -0.25]), (150, 16)), rng.choice(["a", "b", "c"], 150))


@pytest.mark.parametrize("threshold", [-1, 0, 0.375, 0.5, 1])
def test_pairs_and_histogram_are_those_of_comparing_every_two(
    signs: GalleryItems, threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates_module, "ROWS", 16)
    monkeypatch.setattr(duplicates_module, "COLUMNS", 40)
    monkeypatch.setattr(duplicates_module, "MOST_PAIRS", 500)
    similarities = signs.embeddings @ signs.embeddings.T
    expected = [
        (-float(similarities[i, j]), i, j) for i, j in combinations(range(150), 2) if similarities[i, j] >= threshold
    ]
    steps: list[int] = []
    found = find_duplicates(signs, threshold, progress=steps.append)
    assert [(-pair.similarity, int(pair.first), int(pair.second)) for pair in found.pairs] == sorted(expected)[:500]
    within = sum(signs.labels[i] == signs.labels[j] for _, i, j in expected)
    assert (found.within, found.between) == (within, len(expected) - within)
    np.fill_diagonal(similarities, -1)
    assert found.counts == tuple(np.histogram(similarities.max(axis=1), bins=EDGES)[0])
    assert sum(found.counts) == sum(steps) == 150


def test_copies_stand_apart_in_the_histogram(drawn: GalleryItems) -> None:
    found = find_duplicates(drawn, 0.9999)
    assert len(found.pairs) == 10 and found.counts[-1] == 20
    first = found.pairs[0]
    assert (first.first_label, first.second_label) == (drawn.label(int(first.first)), drawn.label(int(first.second)))


@pytest.mark.parametrize("rows", [0, 1])
def test_nothing_to_compare_is_no_error(drawn: GalleryItems, rows: int) -> None:
    found = find_duplicates(drawn.select(np.arange(rows)))
    assert (found.pairs, found.within, found.between, sum(found.counts)) == ((), 0, 0, 0)


@pytest.mark.parametrize("threshold", [1.5, -2, float("nan")])
def test_a_threshold_is_a_similarity(drawn: GalleryItems, threshold: float) -> None:
    with pytest.raises(ValueError, match="between -1 and 1"):
        find_duplicates(drawn, threshold)
