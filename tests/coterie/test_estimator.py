"""CoterieClassifier keeps scikit-learn's conventions and gives the core's answers."""

from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from coterie.classifier import score
from coterie.estimator import CoterieClassifier

Digits = tuple[np.ndarray, np.ndarray]
EXPECTED_FAILURES = {
    "check_estimators_dtypes": "its integers hold a row of zeros, which has no direction and is refused",
}


@parametrize_with_checks(
    [CoterieClassifier(), CoterieClassifier(n_neighbors=3, held_out=0.4)],
    expected_failed_checks=lambda _: EXPECTED_FAILURES,
)
def test_scikit_learns_conventions_are_kept(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.fixture(scope="module")
def digits() -> Digits:
    found = load_digits()
    return found.data[:900], found.target[:900]


@pytest.fixture(scope="module")
def fitted(digits: Digits) -> CoterieClassifier:
    return CoterieClassifier().fit(digits[0][:600], digits[1][:600])


def test_digits_are_named_as_well_as_by_neighbours_alone(fitted: CoterieClassifier, digits: Digits) -> None:
    alone = KNeighborsClassifier(metric="cosine").fit(digits[0][:600], digits[1][:600])
    asked = digits[0][600:], digits[1][600:]
    assert fitted.score(*asked) >= alone.score(*asked) > 0.9


def test_only_directions_count(fitted: CoterieClassifier, digits: Digits) -> None:
    some = digits[0][600:620]
    lengths = np.geomspace(1e-150, 1e150, 20)[:, None]
    np.testing.assert_array_equal(fitted.predict(some), fitted.predict(some * lengths))


def test_answers_are_the_cores(fitted: CoterieClassifier, digits: Digits) -> None:
    some = digits[0][600:700]
    unit = (some / np.linalg.norm(some, axis=1, keepdims=True)).astype(np.float32)
    scores = score(unit, fitted.reference_, fitted.calibration_)
    np.testing.assert_allclose(fitted.predict_proba(some), scores.probabilities, atol=1e-5)
    np.testing.assert_array_equal(fitted.predict(some), fitted.classes_[scores.best])


def test_a_share_of_each_class_calibrates_and_is_not_compared_with(fitted: CoterieClassifier, digits: Digits) -> None:
    labels = digits[1][:600]
    spared = np.setdiff1d(np.arange(600), fitted.indices_)
    for label in fitted.classes_:
        assert np.count_nonzero(labels[spared] == label) == np.count_nonzero(labels == label) // 5
    assert fitted.calibration_.images == len(spared)


def test_what_is_unknown_gets_the_outlier_label(digits: Digits) -> None:
    vectors, labels = digits
    known = labels < 8
    model = CoterieClassifier(false_reject=0.1, outlier_label=-1)
    model.fit(vectors[:600][known[:600]], labels[:600][known[:600]])
    answers = model.predict(vectors[600:])
    assert np.mean(answers[known[600:]] == -1) < 0.25
    assert np.mean(answers[~known[600:]] == -1) > 0.4
    assert (model.set_params(outlier_label=None).predict(vectors[600:]) >= 0).all()


def test_an_outlier_label_may_be_longer_than_the_labels(digits: Digits) -> None:
    vectors, labels = digits
    model = CoterieClassifier(outlier_label="unknown").fit(vectors[:300], labels[:300].astype(str))
    assert "unknown" in model.predict(-vectors[:20])


def test_neighbours_are_those_of_scikit_learn(fitted: CoterieClassifier, digits: Digits) -> None:
    gallery, queries = digits[0][fitted.indices_], digits[0][600:650]
    reference = NearestNeighbors(n_neighbors=4, metric="cosine").fit(gallery)
    distances, rows = reference.kneighbors(queries)
    found_distances, found_rows = fitted.kneighbors(queries, 4)
    np.testing.assert_allclose(found_distances, distances, atol=1e-5)
    np.testing.assert_array_equal(found_rows, fitted.indices_[rows])
    np.testing.assert_array_equal(fitted.kneighbors(queries, 4, return_distance=False), found_rows)


def test_without_queries_each_row_is_asked_for_its_neighbours_other_than_itself(
    fitted: CoterieClassifier, digits: Digits
) -> None:
    reference = NearestNeighbors(n_neighbors=3, metric="cosine").fit(digits[0][fitted.indices_])
    distances, _ = reference.kneighbors()
    found, rows = fitted.kneighbors(n_neighbors=3)
    np.testing.assert_allclose(found, distances, atol=1e-5)
    assert not (rows == fitted.indices_[:, None]).any()


def test_rows_that_are_all_equal_are_not_their_own_neighbours() -> None:
    same = np.ones((40, 3))
    model = CoterieClassifier(n_neighbors=2).fit(same, [0, 1] * 20)
    _, rows = model.kneighbors()
    assert rows.shape == (32, 2)
    assert not (rows == model.indices_[:, None]).any()


def test_it_works_in_pipelines_and_searches(digits: Digits) -> None:
    vectors, labels = digits[0][:400], digits[1][:400]
    assert cross_val_score(make_pipeline(StandardScaler(), CoterieClassifier()), vectors, labels, cv=3).mean() > 0.8
    search = GridSearchCV(CoterieClassifier(), {"n_neighbors": [1, 5]}, cv=3).fit(vectors, labels)
    assert search.best_params_["n_neighbors"] in (1, 5)
    assert search.best_estimator_.calibration_.n_neighbors == search.best_params_["n_neighbors"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"held_out": 0.0}, "held_out is 0.0: give a share between 0 and 1"),
        ({"held_out": 0.01}, "leave none to calibrate with: give a class at least 100 rows"),
        ({"n_neighbors": 0}, "n_neighbors is 0: ask for at least one"),
        ({"false_reject": 0.03}, "false_reject is 0.03: choose one of 0.01, 0.02, 0.05"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    vectors = np.random.default_rng(0).normal(size=(30, 4))
    with pytest.raises(ValueError, match=message):
        CoterieClassifier(**settings).fit(vectors, [0, 1, 2] * 10)


def test_a_row_of_zeros_is_named(fitted: CoterieClassifier) -> None:
    queries = np.ones((3, 64))
    queries[1] = 0
    with pytest.raises(ValueError, match="row 1 of X is zero"):
        fitted.predict(queries)


def test_nothing_is_answered_before_fitting() -> None:
    for ask in (CoterieClassifier().predict, CoterieClassifier().predict_proba, CoterieClassifier().kneighbors):
        with pytest.raises(NotFittedError):
            ask([[1.0, 2.0]])
