"""The protocols against scikit-learn used directly, and what the choice of C may see."""

import numpy as np
import pytest
from numpy import ndarray
from sklearn.svm import SVC, LinearSVC

from trainer.evaluate import linear_svm
from trainer.evaluate.linear_svm import C_GRID, LARGEST_C, PROTOCOLS, fit, score, stratified_holdout


def shapes(rows: int, seed: int = 0) -> tuple[ndarray, ndarray]:
    """Features of four classes that overlap, so that C matters."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(4, 20))
    labels = np.arange(rows) % 4
    return (centres[labels] + 2.5 * generator.normal(size=(rows, 20))).astype(np.float32), labels


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("svm@crosspoint", SVC(kernel="linear", C=0.01)),
        ("svm@i2pmae", SVC(kernel="linear", C=0.0093)),
        ("svm@recon", LinearSVC(C=0.075, dual=True, random_state=0)),
    ],
)
def test_a_preset_is_the_published_classifier(name: str, reference: SVC | LinearSVC) -> None:
    features, labels = shapes(120)
    fitted = fit(PROTOCOLS[name], features, labels, seed=0)
    unseen, _ = shapes(80, seed=1)
    reference.fit(features, labels)
    np.testing.assert_array_equal(fitted.classifier.decision_function(unseen), reference.decision_function(unseen))
    assert fitted.grid == () and fitted.converged


def test_the_default_is_a_grid_search_on_a_holdout_and_a_refit_on_everything() -> None:
    features, labels = shapes(120)
    fitted = fit(PROTOCOLS["svm@heldout"], features, labels, seed=3)

    held_out = stratified_holdout(labels, seed=3)
    expected = [
        SVC(kernel="linear", C=c)
        .fit(features[~held_out], labels[~held_out])
        .score(features[held_out], labels[held_out])
        for c in C_GRID
    ]
    assert [accuracy for _, accuracy in fitted.grid] == expected
    assert fitted.c == C_GRID[int(np.argmax(expected))], "the smallest C among the best"
    refitted = SVC(kernel="linear", C=fitted.c).fit(features, labels)
    np.testing.assert_array_equal(fitted.classifier.support_, refitted.support_)
    assert fitted.num_holdout == held_out.sum() == 24


def test_products_computed_once_give_the_accuracies_of_the_linear_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = shapes(120)
    once = fit(PROTOCOLS["svm@heldout"], features, labels, seed=0)
    monkeypatch.setattr(linear_svm, "_MOST_KERNEL_ROWS", 0)
    again = fit(PROTOCOLS["svm@heldout"], features, labels, seed=0)
    assert once.grid == again.grid and once.c == again.c


@pytest.mark.parametrize(("scale", "c"), [(1.0, 0.316), (0.1, 31.6), (0.01, 3160.0)])
def test_the_scale_of_features_does_not_matter_as_the_grid_follows_it(scale: float, c: float) -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(200, 6))
    labels = (features[:, 1] > 0) + 2 * (features[:, 2] > 0)
    features[:, 0] *= 20  # of which no label depends
    fitted = fit(PROTOCOLS["svm@heldout"], (scale * features).astype(np.float32), labels, seed=3)
    assert fitted.c == c <= LARGEST_C
    assert max(accuracy for _, accuracy in fitted.grid) == pytest.approx(0.93, abs=0.01)
    assert [tried for tried, _ in fitted.grid][: len(C_GRID)] == list(C_GRID)


def test_held_out_rows_do_not_take_part_in_the_fits_that_judge_them() -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(200, 400)).astype(np.float32)  # enough to learn any labels by heart
    labels = generator.integers(0, 4, 200)
    fitted = fit(PROTOCOLS["svm@heldout"], features, labels, seed=0)
    assert fitted.classifier.score(features, labels) == 1.0, "the last fit is on all training rows"
    assert max(accuracy for _, accuracy in fitted.grid) < 0.5, "no C can know labels that are drawn by lot"


def test_the_holdout_is_stratified_seeded_and_leaves_each_class_a_row() -> None:
    labels = np.array([0] * 50 + [1] * 10 + [2] * 2 + [3])
    held_out = stratified_holdout(labels, seed=0)
    assert [int(held_out[labels == label].sum()) for label in range(4)] == [10, 2, 1, 0]
    np.testing.assert_array_equal(held_out, stratified_holdout(labels, seed=0))
    assert (held_out != stratified_holdout(labels, seed=1)).any()


def test_choosing_c_without_two_rows_of_any_class_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two training rows"):
        fit(PROTOCOLS["svm@heldout"], np.eye(4, dtype=np.float32), np.arange(4), seed=0)


def test_a_solver_that_stops_early_is_reported() -> None:
    features, labels = shapes(120)
    fitted = fit(PROTOCOLS["svm@recon"], features * 1000, labels, seed=0)
    assert not fitted.converged


def test_scores_agree_with_counting_by_hand() -> None:
    labels = np.array([0, 0, 0, 1, 1, 3])
    predicted = np.array([0, 0, 1, 1, 0, 3])
    scores = score(predicted, labels, ("a", "b", "c", "d"))
    assert scores.accuracy == pytest.approx(4 / 6)
    assert scores.per_class_accuracy == {"a": pytest.approx(2 / 3), "b": 0.5, "c": None, "d": 1.0}
    assert scores.class_mean_accuracy == pytest.approx((2 / 3 + 0.5 + 1) / 3)
    assert scores.confusion == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
