"""Labelled vectors less some of their classes."""

import numpy as np

from coterie.clusters import ClassClusters
from coterie.reference import LabelledVectors


def test_several_classes_are_taken_away_at_once_as_one_after_another() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(60, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    classes = rng.permutation(np.repeat(np.arange(6), 10))
    gallery = LabelledVectors(vectors, classes, ClassClusters.fit(vectors, np.asarray(list("abcdef"))[classes]))
    found, expected = gallery.without(4, 1), gallery.without(4).without(1)
    assert found.clusters.labels == expected.clusters.labels == ("a", "c", "d", "f")
    kept = ~np.isin(classes, [1, 4])
    for one in (found, expected):
        np.testing.assert_array_equal(one.embeddings, vectors[kept])
        np.testing.assert_array_equal(np.asarray(list("acdf"))[one.classes], np.asarray(list("abcdef"))[classes[kept]])
    np.testing.assert_array_equal(found.clusters.prototypes, expected.clusters.prototypes)
    np.testing.assert_array_equal(found.clusters.owners, expected.clusters.owners)
