"""Exact search beside other libraries: median time of one query for its 20 nearest, of 20 k and 200 k × 128.

    uv venv PEERS
    uv pip install --python PEERS numpy "faiss-cpu<2" hnswlib usearch scikit-learn qdrant-client lancedb chromadb
    PYTHONPATH=. PEERS/bin/python -m benchmarks.index_peers [--rows 20000 200000] [--queries 100] [--json FILE]

They have an environment of their own, for the project needs none of them. All get the same vectors (1,000 classes,
cosine 0.5 within a class) and the same queries in turns. Each is asked for exact search where it has any: hnswlib's
BFIndex, usearch.search(exact=True), scikit-learn's brute force, qdrant-client in memory, LanceDB without an index.
Chroma has none: its graph gets more candidates than its default of 100, and the recall that it reaches is printed. One
thread each but for LanceDB, which keeps its own. Payloads and vectors are not asked for where that can be said. Exits
with 1 where another library is faster at recall 1.

Two cores of a shared AMD EPYC, beside other work, 100 queries, ms at 20 k and 200 k, all at recall 1: coterie 0.64 and
3.77, hnswlib 0.80 and 7.88, usearch 1.69 and 20.2, scikit-learn 2.31 and 31.3, qdrant-client 2.22 and 43.6, LanceDB
5.64 and 107, Chroma 3.74 and 5.01.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from benchmarks.index import K, Vectors, clouds, directions, interleaved, machine, record
from coterie.index import build_index
from coterie.machine import processors

Ask = Callable[[Vectors], Any]  # one query (d,) → rows, or something that holds them

PACKAGES = ("hnswlib", "usearch", "scikit-learn", "qdrant-client", "lancedb", "chromadb")
CHUNK = 5000
CHROMA_CANDIDATES = 2000


def coterie(vectors: Vectors, folder: Path) -> Ask:
    index = build_index(vectors)
    assert index.report.kind == "exact"
    return lambda query: index.search(query[None], K)[1][0]


def hnswlib(vectors: Vectors, folder: Path) -> Ask:
    import hnswlib

    index = hnswlib.BFIndex(space="ip", dim=vectors.shape[1])
    index.init_index(max_elements=len(vectors))
    index.add_items(vectors, np.arange(len(vectors)))
    index.set_num_threads(1)
    return lambda query: index.knn_query(query, K)[0][0]


def usearch(vectors: Vectors, folder: Path) -> Ask:
    from usearch.index import MetricKind, search

    return lambda query: search(vectors, query, K, MetricKind.IP, exact=True, threads=1).keys


def scikit_learn(vectors: Vectors, folder: Path) -> Ask:
    from sklearn.neighbors import NearestNeighbors

    neighbors = NearestNeighbors(n_neighbors=K, algorithm="brute").fit(vectors)  # of unit length: the same order
    return lambda query: neighbors.kneighbors(query[None], return_distance=False)[0]


def qdrant(vectors: Vectors, folder: Path) -> Ask:
    from qdrant_client import QdrantClient, models

    client = QdrantClient(":memory:")
    settings = models.VectorParams(size=vectors.shape[1], distance=models.Distance.DOT)
    client.create_collection("items", vectors_config=settings)
    client.upload_collection("items", vectors=vectors, ids=range(len(vectors)))

    def ask(query: Vectors) -> list[int]:
        answer = client.query_points("items", query=query, limit=K, with_payload=False)
        return [point.id for point in answer.points]

    return ask


def lancedb(vectors: Vectors, folder: Path) -> Ask:
    import lancedb
    import pyarrow as pa

    column = pa.FixedSizeListArray.from_arrays(vectors.ravel(), vectors.shape[1])
    rows = pa.table({"id": np.arange(len(vectors)), "vector": column})
    table = lancedb.connect(folder).create_table("items", rows)

    def ask(query: Vectors) -> Any:
        search = table.search(query).distance_type("dot").select(["id", "_distance"]).limit(K)
        return search.to_arrow()["id"].to_numpy()

    return ask


def chroma(vectors: Vectors, folder: Path) -> Ask:
    import chromadb

    settings = chromadb.Settings(anonymized_telemetry=False)
    client = chromadb.PersistentClient(str(folder), settings)
    hnsw = {"space": "ip", "ef_search": CHROMA_CANDIDATES, "num_threads": 1}
    collection = client.create_collection("items", configuration={"hnsw": hnsw})
    for start in range(0, len(vectors), CHUNK):
        part = vectors[start : start + CHUNK]
        collection.add([str(row) for row in range(start, start + len(part))], embeddings=part)

    def ask(query: Vectors) -> list[int]:
        answer = collection.query(query_embeddings=query[None], n_results=K, include=[])
        return [int(identifier) for identifier in answer["ids"][0]]

    return ask


LIBRARIES = {
    "coterie": coterie,
    "hnswlib": hnswlib,
    "usearch": usearch,
    "scikit-learn": scikit_learn,
    "qdrant-client": qdrant,
    "LanceDB": lancedb,
    "Chroma": chroma,
}


def measure(n: int, count: int) -> dict[str, dict[str, float]]:
    """Median milliseconds, recall and seconds to set up, by library."""
    rng = np.random.default_rng(0)
    centres = directions(rng, 1000)
    vectors, _ = clouds(rng, centres, n, 0.5)
    queries, _ = clouds(rng, centres, count, 0.5)
    exact = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    least = np.sort(exact, axis=1)[:, -K] - 1e-6  # whoever is as near as the 20th is one of them
    with TemporaryDirectory() as folder:
        asks, seconds, recalls = {}, {}, {}
        for name, build in LIBRARIES.items():
            began = time.perf_counter()
            asks[name] = build(vectors, Path(folder) / name)
            seconds[name] = time.perf_counter() - began
            found = [np.unique(np.asarray(asks[name](query), dtype=np.int64)) for query in queries]
            near = [(line[rows] >= edge).sum() for line, rows, edge in zip(exact, found, least, strict=True)]
            recalls[name] = float(np.mean(near)) / K
        print(f"{n:,} × {vectors.shape[1]}, timing", flush=True)
        times = interleaved({name: lambda run, ask=ask: ask(queries[run]) for name, ask in asks.items()}, count)
    return {
        name: {"milliseconds": times[name], "recall": recalls[name], "setup_seconds": seconds[name]}
        for name in LIBRARIES
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--json", type=Path, help="write the results there, too")
    options = parser.parse_args()
    print(f"{machine()}, {processors()} processors, load {os.getloadavg()[0]:.1f}", flush=True)
    found, goals = {}, {}
    for rows in options.rows:
        results = found[str(rows)] = measure(rows, options.queries)
        ours = results["coterie"]["milliseconds"]
        print(f"{'':16}{'p50, ms':>10}{'times':>8}{'recall':>9}{'set up, s':>11}")
        for name, result in results.items():
            print(
                f"{name:16}{result['milliseconds']:10.3f}{result['milliseconds'] / ours:8.1f}"
                f"{result['recall']:9.4f}{result['setup_seconds']:11.1f}"
            )
            if name != "coterie":
                behind = result["milliseconds"] > ours or result["recall"] < 1
                goals[f"{name} is slower, or not exact, at {rows:,} rows"] = behind
        for goal, reached in goals.items():
            print(f"{'met' if reached else 'MISSED':8}{goal}")
        print(flush=True)
    record(options.json, "peers", {"queries": options.queries, "found": found, "goals": goals}, PACKAGES)
    return 0 if all(goals.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
