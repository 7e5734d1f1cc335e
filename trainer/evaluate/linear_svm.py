"""Linear SVM on frozen features: the published presets by name, and a default that never looks at the test split.

"The" linear SVM of the papers is several recipes, which differ in solver and C; most chose C on the test split. A
preset repeats one paper's choice as it was published; `svm@heldout` chooses C on a hold-out of the training rows.
"""

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import numpy as np
from jaxtyping import Float, Int64
from numpy import ndarray

HOLDOUT_SHARE: Final = 0.2
_HALF_DECADES: Final = tuple(float(f"{10**exponent:.3g}") for exponent in np.arange(-4, 6.5, 0.5))
C_GRID: Final = _HALF_DECADES[:13]
"""Half decades from 0.0001 to 100: the published values lie between 0.0093 and 1, for features of other scales.

The C that suits features grows as the square of their scale shrinks, and they are not scaled. So the grid goes on upward
for as long as its largest C does best, up to `LARGEST_C`: no encoder is judged by how large its numbers are.
"""
LARGEST_C: Final = _HALF_DECADES[-1]

_MOST_KERNEL_ROWS: Final = 12_000  # whose products take 1.2 GB


@dataclass(frozen=True)
class LinearSVM:
    """One protocol: which solver, and which C."""

    summary: str
    solver: Literal["SVC", "LinearSVC"]  # one-vs-one with hinge loss; one-vs-rest with squared hinge loss
    c: float | None  # None: chosen on a hold-out of the training rows
    c_chosen_on: Literal["hold-out of train", "test split, by the paper's authors"]


PROTOCOLS: Final[dict[str, LinearSVM]] = {
    "svm@heldout": LinearSVM(
        "SVC, C chosen on a stratified fifth of train, refit on all of train, scored once on test (the default)",
        "SVC",
        None,
        "hold-out of train",
    ),
    "svm@crosspoint": LinearSVM(
        "SVC, C = 0.01, as CrossPoint reports", "SVC", 0.01, "test split, by the paper's authors"
    ),
    "svm@i2pmae": LinearSVM("SVC, C = 0.0093, as I2P-MAE reports", "SVC", 0.0093, "test split, by the paper's authors"),
    "svm@recon": LinearSVM(
        "LinearSVC, C = 0.075, as ReCon reports", "LinearSVC", 0.075, "test split, by the paper's authors"
    ),
}


@dataclass(frozen=True)
class Fitted:
    """A classifier that has seen training rows only, and how its C came about."""

    classifier: Any  # scikit-learn's
    c: float
    grid: tuple[tuple[float, float], ...]  # (C, accuracy on the hold-out); empty for a preset
    num_holdout: int
    converged: bool

    def settings(self, protocol: LinearSVM) -> dict[str, Any]:
        """Everything that defines the fit, for the record."""
        return {
            **asdict(protocol),
            "c": self.c,
            "solver_parameters": self.classifier.get_params(),
            "feature_scaling": None,
            "holdout_share": HOLDOUT_SHARE if self.grid else None,
        }


def fit(protocol: LinearSVM, features: Float[ndarray, "n d"], labels: Int64[ndarray, " n"], seed: int) -> Fitted:
    """The protocol's classifier, fitted on training rows. Test rows have no way in: they are not an argument."""
    if protocol.c is None:
        c, grid, num_holdout = _choose_c(features, labels, seed)
    else:
        c, grid, num_holdout = protocol.c, (), 0
    classifier, converged = _fit_at(protocol, c, features, labels, seed)
    return Fitted(classifier, c, grid, num_holdout, converged)


def stratified_holdout(labels: Int64[ndarray, " n"], seed: int) -> ndarray:
    """True for the rows held out: a fifth of each class, at least one, and none of a class that has a single row."""
    generator = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        if len(members) > 1:
            held_out[members[: max(1, round(HOLDOUT_SHARE * len(members)))]] = True
    return held_out


def _choose_c(features: ndarray, labels: ndarray, seed: int) -> tuple[float, tuple[tuple[float, float], ...], int]:
    """The C of the grid that does best on the hold-out; the smallest of equals, which regularises most."""
    held_out = stratified_holdout(labels, seed)
    if not held_out.any():
        raise ValueError("choosing C needs a class with at least two training rows")
    fitted_on, judged_on = features[~held_out].astype(np.float64), features[held_out].astype(np.float64)
    accuracy = _judge(fitted_on, labels[~held_out], judged_on, labels[held_out])
    grid = [(c, accuracy(c)) for c in C_GRID]
    while (best := _best(grid)) == grid[-1][0] < LARGEST_C:
        larger = _HALF_DECADES[len(grid)]
        grid.append((larger, accuracy(larger)))
    return best, tuple(grid), int(held_out.sum())


def _best(grid: list[tuple[float, float]]) -> float:
    """The smallest C among the best."""
    return max(grid, key=lambda entry: (entry[1], -entry[0]))[0]


def _judge(fitted_on: ndarray, labels: ndarray, judged_on: ndarray, judged_labels: ndarray) -> Callable[[float], float]:
    """What an SVC of some C reaches on the second rows after it was fitted on the first.

    All products of two rows are computed once: libsvm by itself computes them again for every C, several times each
    (five times slower on 1,600 rows, and more on more). They are the same products, so the classifier is the same.
    """
    from sklearn.svm import SVC

    kernel = "precomputed" if len(fitted_on) <= _MOST_KERNEL_ROWS else "linear"
    if kernel == "precomputed":
        fitted_on, judged_on = fitted_on @ fitted_on.T, judged_on @ fitted_on.T
    return lambda c: float(SVC(kernel=kernel, C=c).fit(fitted_on, labels).score(judged_on, judged_labels))


def _fit_at(protocol: LinearSVM, c: float, features: ndarray, labels: ndarray, seed: int) -> tuple[Any, bool]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import SVC, LinearSVC

    if protocol.solver == "SVC":
        one_vs_one = SVC(kernel="linear", C=c).fit(features, labels)
        return one_vs_one, one_vs_one.fit_status_ == 0
    # dual: scikit-learn's default when the presets were published; its coordinate descent draws from random_state
    one_vs_rest = LinearSVC(C=c, dual=True, random_state=seed)
    with warnings.catch_warnings():
        # the papers' code lets it stop early as well; the record says whether it did
        warnings.simplefilter("ignore", ConvergenceWarning)
        one_vs_rest.fit(features, labels)
    return one_vs_rest, bool(one_vs_rest.n_iter_ < one_vs_rest.max_iter)


@dataclass(frozen=True)
class Scores:
    """How predictions compare with labels, over all rows and by class."""

    accuracy: float
    class_mean_accuracy: float  # over the classes that have rows
    per_class_accuracy: dict[str, float | None]  # None: no row of that class
    confusion: list[list[int]]  # [true class][predicted class]


def score(predicted: Int64[ndarray, " n"], labels: Int64[ndarray, " n"], class_names: tuple[str, ...]) -> Scores:
    """Accuracy, its mean over classes, and the confusion matrix."""
    confusion = np.zeros((len(class_names), len(class_names)), dtype=np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    totals, hits = confusion.sum(axis=1), confusion.diagonal()
    per_class = {
        name: float(hit / total) if total else None for name, hit, total in zip(class_names, hits, totals, strict=True)
    }
    present = [accuracy for accuracy in per_class.values() if accuracy is not None]
    return Scores(
        accuracy=float(hits.sum() / totals.sum()),
        class_mean_accuracy=float(np.mean(present)),
        per_class_accuracy=per_class,
        confusion=confusion.tolist(),
    )
