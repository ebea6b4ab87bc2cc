"""A linear classifier on the bundle's embeddings: what is in them beyond nearness."""

import warnings

import numpy as np
from numpy.typing import NDArray

__all__ = ["PROBE_ITEMS", "linear_probe"]

# So many gallery items, evenly chosen, are fitted: a few seconds for ten classes, a minute for a thousand.
PROBE_ITEMS = 20_000
ITERATIONS = 200


def linear_probe(
    gallery: NDArray[np.float32], classes: NDArray[np.int64], embeddings: NDArray[np.float32]
) -> NDArray[np.int64]:
    """The classes of queries (n, d), (n,), by scikit-learn's LogisticRegression (C = 1) fitted to a gallery (m, d).

    The embeddings are multiplied by √d first, to a variance of about 1 a number, which C presumes.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    step = -(-len(gallery) // PROBE_ITEMS) or 1
    # In steps through the gallery ordered by class, so that none is missed that has as many items as the step.
    chosen = np.argsort(classes, kind="stable")[::step]
    if len(np.unique(classes[chosen])) < 2:
        return np.full(len(embeddings), classes[0])
    scale = np.float32(np.sqrt(gallery.shape[1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 200 rounds are the definition, converged or not
        model = LogisticRegression(max_iter=ITERATIONS).fit(gallery[chosen] * scale, classes[chosen])
    return np.asarray(model.predict(embeddings * scale))
