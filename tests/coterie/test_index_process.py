"""What kills the process, hangs it or is quietly wrong in FAISS itself, done through our indexes.

Each runs in a process of its own, which must end well: a crash of FAISS cannot be caught.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PREAMBLE = """
import os, sys, threading
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from coterie.index import ExactIndex, InvertedIndex

rng = np.random.default_rng(0)
def unit(n, d=16):
    vectors = rng.normal(size=(n, d)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

def refused(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except ValueError as error:
        assert str(error)
        return True
    return False

vectors, queries = unit(3000), unit(64)
indexes = [ExactIndex(vectors), InvertedIndex(vectors, probes=4), InvertedIndex(vectors, quantized=True, probes=4)]
"""


def run(code: str, **environment: str) -> str:
    """What the code prints, after the preamble."""
    others = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", PREAMBLE + code]
    done = subprocess.run(command, env=others | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_many_threads_filter_at_once() -> None:
    """One FAISS selector used by several threads is a segmentation fault."""
    run("""
mask = rng.random(3000) < 0.5
few = np.flatnonzero(rng.random(3000) < 0.05)
for index in indexes:
    jobs = [(row, allowed) for row in range(0, 64, 2) for allowed in (None, mask, few)] * 4
    def search(job):
        row, allowed = job
        return [part.tolist() for part in index.search(queries[row : row + 2], 10, allowed=allowed)]
    alone = [search(job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(search, jobs)) == alone
""")


def test_rows_come_and_go_while_others_search() -> None:
    """Adding to a FAISS index that is being searched is a segmentation fault, or silently wrong."""
    run("""
for index in indexes:
    expected, stop, wrong = [part.tolist() for part in index.search(queries, 10)], threading.Event(), []
    def search():
        while not stop.is_set():
            if [part.tolist() for part in index.search(queries, 10)] != expected:
                wrong.append(index)
    threads = [threading.Thread(target=search) for _ in range(4)]
    for thread in threads:
        thread.start()
    changed = index
    for _ in range(20):
        kept = np.sort(rng.permutation(len(changed))[:-100])
        changed = changed.updated(np.concatenate([changed.vectors[kept], unit(100)]), kept)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    new = changed.vectors[-1:]
    assert changed.search(new, 1)[1].tolist() == [[2999]]
""")


def test_a_child_process_searches_after_its_parent() -> None:
    """A child forked after a search by several threads hangs for ever in its first search."""
    run("""
expected = [index.search(queries, 10)[1].tolist() for index in indexes]
child = os.fork()
if not child:
    found = [index.search(queries, 10)[1].tolist() for index in indexes]
    os._exit(0 if found == expected else 1)
assert os.waitpid(child, 0)[1] == 0
""")


def test_more_neighbours_than_there_are_and_than_the_lists_hold() -> None:
    """FAISS answers with rows -1 of similarity -3.4e38."""
    run("""
for index in indexes:
    for k in (100, 3000, 5000):
        similarities, rows = index.search(queries[:2], k)
        assert rows.shape == (2, min(k, 3000)) and rows.min() >= 0 and abs(similarities).max() <= 1
        assert all(len(set(row)) == len(row) for row in rows.tolist())
""")


def test_what_is_not_a_number_is_refused() -> None:
    """FAISS answers a NaN query with rows -1, and never finds a NaN row."""
    run("""
for index in indexes:
    for wrong in (np.nan, np.inf, -np.inf):
        bad = queries.copy()
        bad[5, 3] = wrong
        assert refused(index.search, bad, 5)
        assert refused(index.search, bad, 5, allowed=[1, 2])
        assert refused(index.updated, np.concatenate([vectors, bad]), np.arange(3000))
        assert refused(ExactIndex, bad) and refused(InvertedIndex, bad)
""")


def test_a_wrong_width_is_refused_in_words() -> None:
    """FAISS raises an AssertionError without a message."""
    run("""
for index in indexes:
    for wrong in (unit(2, 15), unit(2, 17), queries[0], queries[None]):
        assert refused(index.search, wrong, 5)
""")


def test_other_types_of_numbers_are_read_as_they_are_meant() -> None:
    run("""
corners = np.eye(16)
for index in indexes:
    for kind in (np.float16, np.float32, np.float64, np.int8, bool, ">f4"):
        assert index.search(corners.astype(kind), 5)[1].tolist() == index.search(corners, 5)[1].tolist()
    assert index.search(np.asfortranarray(queries), 5)[1].tolist() == index.search(queries, 5)[1].tolist()
    assert index.search(queries[::-1], 5)[1].tolist() == index.search(queries, 5)[1][::-1].tolist()
""")


def test_rows_that_are_gone_stay_gone() -> None:
    """FAISS aborts where a missing id is reconstructed among others, and keeps ghosts of an id that was added twice."""
    run("""
for index in indexes:
    assert refused(index.updated, vectors[:2], [3000]) and refused(index.updated, vectors[:2], [-1, 2])
    assert refused(index.updated, vectors[:2], [1, 1])
    kept = np.arange(0, 3000, 2)
    half = index.updated(vectors[kept], kept)
    again = half.updated(np.concatenate([vectors[kept], vectors[1::2]]), np.arange(1500))
    assert refused(half.search, queries, 1, allowed=[1500])
    for row in (1, 701, 2999):
        assert half.search(vectors[row : row + 1], 1)[0].item() < 1
        assert again.search(vectors[row : row + 1], 1)[1].item() == 1500 + row // 2
    assert len(set(again.search(queries[:1], 3000)[1][0].tolist())) == 3000
""")


def test_vectors_in_a_read_only_file_can_be_searched_and_updated(tmp_path: Path) -> None:
    """FAISS aborts where rows are added to an index that is mapped from a file."""
    run(
        """
np.save(os.environ["FILE"], vectors)
vectors = np.load(os.environ["FILE"], mmap_mode="r")
mapped = [ExactIndex(vectors), InvertedIndex(vectors, probes=4), InvertedIndex(vectors, quantized=True, probes=4)]
for index, other in zip(indexes, mapped):
    for allowed in (None, np.arange(0, 3000, 2), np.arange(10)):
        found = [part.tolist() for part in other.search(queries, 5, allowed=allowed)]
        assert found == [part.tolist() for part in index.search(queries, 5, allowed=allowed)]
    grown = other.updated(np.concatenate([vectors, queries]), np.arange(3000))
    assert grown.search(queries, 1)[1].ravel().tolist() == list(range(3000, 3064))
""",
        FILE=str(tmp_path / "vectors.npy"),
    )


@pytest.mark.parametrize(("setting", "threads"), [({}, "1 1"), ({"OMP_NUM_THREADS": "2"}, "2 2")])
def test_every_thread_searches_with_one_thread_unless_the_environment_says_otherwise(
    setting: dict[str, str], threads: str
) -> None:
    """FAISS's own setting holds for the thread that makes it alone."""
    code = """
import faiss
with ThreadPoolExecutor(1) as pool:
    print(faiss.omp_get_max_threads(), pool.submit(faiss.omp_get_max_threads).result())
"""
    assert run(code, **setting).strip() == threads


def test_four_queries_are_one_matrix_product() -> None:
    """FAISS multiplies one row at a time up to 128,000 / d queries, ten times as slowly."""
    assert run("import faiss; print(faiss.cvar.distance_compute_blas_threshold)").strip() == "64"
