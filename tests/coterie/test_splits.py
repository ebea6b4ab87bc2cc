"""Splits that depend on contents alone, and groups that stay on one side."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.errors import DataError
from coterie.splits import group_by_pattern, split_by_hash

# Contents are numbers; each has a label, and with groups a pair of label and group.
singles = st.dictionaries(st.integers(0, 10**6), st.integers(0, 3), min_size=1, max_size=60)
grouped = st.dictionaries(
    st.integers(0, 10**6), st.tuples(st.integers(0, 3), st.integers(0, 12)), min_size=1, max_size=60
)
fractions = st.floats(0, 1)
Grouped = dict[int, tuple[int, int]]


def hashes_of(contents: dict[int, object]) -> list[str]:
    return [hashlib.sha256(str(content).encode()).hexdigest() for content in contents]


def chosen_of(contents: dict[int, object], chosen: np.ndarray) -> set[int]:
    return {content for content, taken in zip(contents, chosen.tolist(), strict=True) if taken}


def split(rows: dict[int, int], fraction: float, seed: int = 0) -> set[int]:
    labels = np.asarray(list(rows.values()), dtype=np.int64)
    return chosen_of(rows, split_by_hash(labels, hashes_of(rows), fraction, seed=seed))


def split_groups(rows: Grouped, fraction: float, name: str = "object {}") -> set[int]:
    labels = np.asarray([label for label, _ in rows.values()], dtype=np.int64)
    groups = [name.format(group) for _, group in rows.values()]
    return chosen_of(rows, split_by_hash(labels, hashes_of(rows), fraction, groups=groups))


def first_of_each_class(rows: dict[int, int], fraction: float, seed: int) -> set[int]:
    """The rule for images without groups, spelt out: the first t of each class in salted order."""
    chosen: set[int] = set()
    for label in set(rows.values()):
        members = {content: label for content, own in rows.items() if own == label}
        salted = [hashlib.sha256(f"{seed}:{digest}".encode()).hexdigest() for digest in hashes_of(members)]
        ordered = [content for _, content in sorted(zip(salted, members, strict=True))]
        chosen.update(ordered[: min(round(fraction * len(members)), len(members) - 1)])
    return chosen


# Single images


@given(rows=singles, fraction=fractions, seed=st.integers(0, 9))
def test_without_groups_the_first_of_each_class_are_chosen(rows: dict[int, int], fraction: float, seed: int) -> None:
    assert split(rows, fraction, seed) == first_of_each_class(rows, fraction, seed)


@given(rows=singles, fraction=fractions)
def test_groups_of_one_image_change_nothing(rows: dict[int, int], fraction: float) -> None:
    one_each = {content: (label, content) for content, label in rows.items()}
    assert split_groups(one_each, fraction) == split(rows, fraction)


@given(rows=singles, fraction=fractions, order=st.randoms(use_true_random=False))
def test_the_split_does_not_depend_on_the_order(rows: dict[int, int], fraction: float, order: object) -> None:
    mixed = list(rows.items())
    order.shuffle(mixed)  # type: ignore[attr-defined]
    assert split(dict(mixed), fraction) == split(rows, fraction)


@given(rows=singles, fraction=fractions)
def test_each_class_gives_its_share_and_keeps_an_image(rows: dict[int, int], fraction: float) -> None:
    chosen = split(rows, fraction)
    for label in set(rows.values()):
        members = {content for content, own in rows.items() if own == label}
        assert len(members & chosen) == min(round(fraction * len(members)), len(members) - 1)


@given(rows=singles, fraction=fractions)
def test_a_class_is_split_without_regard_to_the_others(rows: dict[int, int], fraction: float) -> None:
    alone = {content: label for content, label in rows.items() if label == 0}
    assert split(alone, fraction) == {content for content in split(rows, fraction) if rows[content] == 0}


@given(rows=singles, few=fractions, more=fractions)
def test_a_larger_fraction_adds_to_a_smaller_one(rows: dict[int, int], few: float, more: float) -> None:
    few, more = sorted((few, more))
    assert split(rows, few) <= split(rows, more)


@given(rows=singles, fraction=fractions, new=st.integers(10**6 + 1, 10**7))
def test_a_new_image_moves_at_most_one_other(rows: dict[int, int], fraction: float, new: int) -> None:
    moved = split(rows, fraction) ^ (split({**rows, new: 0}, fraction) - {new})
    assert len(moved) <= 1


def test_another_seed_is_another_split() -> None:
    rows = dict.fromkeys(range(100), 0)
    assert len(split(rows, 0.5) & split(rows, 0.5, seed=1)) < 40
    assert split(rows, 0.5, seed=1) == split(rows, 0.5, seed=1)


# Groups


@given(rows=grouped, fraction=fractions)
def test_a_group_is_never_torn(rows: Grouped, fraction: float) -> None:
    chosen = split_groups(rows, fraction)
    left = {group for content, (_, group) in rows.items() if content not in chosen}
    assert not left & {rows[content][1] for content in chosen}


@given(rows=grouped, fraction=fractions)
def test_each_class_keeps_an_image_and_overshoots_by_at_most_half_a_group(rows: Grouped, fraction: float) -> None:
    sizes = Counter(label for label, _ in rows.values())
    chosen = Counter(rows[content][0] for content in split_groups(rows, fraction))
    for label, size in sizes.items():
        largest = max(Counter(group for own, group in rows.values() if own == label).values())
        assert chosen[label] < size
        assert chosen[label] <= round(fraction * size) + largest / 2


@given(rows=grouped, fraction=fractions, order=st.randoms(use_true_random=False))
def test_neither_order_nor_names_of_groups_matter(rows: Grouped, fraction: float, order: object) -> None:
    mixed = list(rows.items())
    order.shuffle(mixed)  # type: ignore[attr-defined]
    assert split_groups(dict(mixed), fraction, name="part-{}.") == split_groups(rows, fraction)


@pytest.mark.parametrize(("fraction", "images"), [(0.1, 0), (0.2, 3), (0.3, 3), (0.4, 6), (0.9, 9), (1, 9)])
def test_a_group_counts_if_at_least_half_of_it_is_wanted(fraction: float, images: int) -> None:
    # 12 images, 3 an object: the targets are 1, 2, 4, 5, 11 and 12, and with m chosen m + 1.5 must not exceed them.
    assert len(split_groups({content: (0, content // 3) for content in range(12)}, fraction)) == images


def test_many_small_groups_come_near_the_fraction() -> None:
    rows = {content: (content % 2, content // 6) for content in range(600)}  # 3 images of each class an object
    chosen = Counter(rows[content][0] for content in split_groups(rows, 0.2))
    assert chosen == {0: 60, 1: 60}


def test_a_class_of_one_object_gives_nothing() -> None:
    rows = {content: (content % 2, 0 if content % 2 else content) for content in range(40)}
    assert {rows[content][0] for content in split_groups(rows, 0.5)} == {0}


def test_a_group_must_fit_all_its_classes() -> None:
    # Both classes aim at 1 of 4. The large group has 3 of class 0 (1.5 > 1), so that its one of class 1 stays too.
    labels = np.asarray([0, 0, 0, 1, 0, 1, 1, 1])
    groups = ["large", "large", "large", "large", "a", "b", "c", "d"]
    for seed in range(20):
        chosen = split_by_hash(labels, list("01234567"), 0.25, seed=seed, groups=groups)
        assert chosen[:5].tolist() == [False, False, False, False, True]
        assert chosen[5:].sum() == 1


# Patterns


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        (r"part(\d+)", ("1", "1", "22", "ok/lone.png")),
        (r"part\d+", ("part1", "part1", "part22", "ok/lone.png")),
        (r"part(\d)(\d)", ("ok/part1_a.png", "bad/part1_b.png", "2", "ok/lone.png")),
        (r"^(spring)/", ("ok/part1_a.png", "bad/part1_b.png", "spring", "ok/lone.png")),
        (r"part(\d)\d|lone", ("ok/part1_a.png", "bad/part1_b.png", "2", "ok/lone.png")),
        (r"part(2*)", ("ok/part1_a.png", "bad/part1_b.png", "22", "ok/lone.png")),
    ],
)
def test_a_pattern_finds_the_object_in_the_path_below_the_class(pattern: str, names: tuple[str, ...]) -> None:
    paths = ["ok/part1_a.png", "bad/part1_b.png", "bad/spring/part22.png", "ok/lone.png"]
    assert group_by_pattern([Path(path) for path in paths], pattern) == names


def test_a_pattern_that_is_no_regular_expression_is_named() -> None:
    with pytest.raises(DataError, match=r"'\(part' is not a regular expression"):
        group_by_pattern([Path("ok/part1.png")], "(part")


@pytest.mark.parametrize("pattern", ["part", "ok", "x*"])
def test_a_pattern_that_is_found_nowhere_is_a_mistake(pattern: str) -> None:
    with pytest.raises(DataError, match="found in none of the 2 paths below the class folders"):
        group_by_pattern([Path("ok/1.png"), Path("bad/2.png")], pattern)
