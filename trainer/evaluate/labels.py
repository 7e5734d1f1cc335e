"""Which shapes of a store have labels, and whether they suffice for a protocol: no network is needed to know it."""

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from datastore.layout import Store
from trainer.evaluate import TEST, TRAIN
from trainer.evaluate.linear_svm import PROTOCOLS

UNLABELLED: Final = -1
_ROWS_AT_A_TIME: Final = 2**16  # half a megabyte of labels


def labelled_rows(store: Store, split: str) -> tuple[Int64[ndarray, " n"], Int64[ndarray, " n"]]:
    """Rows of a split and their labels, without the quarantined and the unlabelled."""
    rows = store.rows(split)
    labels = store.read("label", rows)
    return rows[labels != UNLABELLED], labels[labels != UNLABELLED]


def unmet_needs(store: Store, protocols: Sequence[str]) -> list[str]:
    """What a store lacks for these protocols, in words; empty where it lacks nothing.

    Labels are read until they suffice, which is a moment's work on all but unlabelled stores. Of a store whose ingest goes
    on, only that is said which later rows cannot mend.
    """
    if not protocols:
        return []
    has = ", ".join(f"{split!r} {len(store.row_ranges(split)):,}" for split in store.splits)
    absent = [split for split in (TRAIN, TEST) if split not in store.splits]
    if absent:
        return [f"it has no split {' and no split '.join(map(repr, absent))}; it has {has}"]
    if len(store.class_names) < 2:
        return [f"its shapes are of {len(store.class_names)} classes, and a classifier tells two or more apart"]
    if not store.is_complete():
        return []
    chooses_c = any(PROTOCOLS[name].c is None for name in protocols)
    needs = []
    if not any(counts.any() for counts in _class_counts(store, TEST)):
        needs.append(f"split {TEST!r} has no labelled shape; the store has {has}")
    if not any(np.count_nonzero(counts) > 1 for counts in _class_counts(store, TRAIN)):
        needs.append(f"split {TRAIN!r} has no labelled shapes of two classes; the store has {has}")
    elif chooses_c and not any(counts.max() > 1 for counts in _class_counts(store, TRAIN)):
        needs.append(f"split {TRAIN!r} has no two shapes of one class, so that none can be held out to choose C")
    return needs


def _class_counts(store: Store, split: str) -> Iterator[Int64[ndarray, " k"]]:
    """Labelled shapes of each class among the first rows of a split, then among more and more of them."""
    rows = store.row_ranges(split)
    counts = np.zeros(len(store.class_names), dtype=np.int64)
    for first in range(0, len(rows), _ROWS_AT_A_TIME):
        labels = store.read("label", rows[np.arange(first, min(first + _ROWS_AT_A_TIME, len(rows)))])
        counts += np.bincount(labels[labels != UNLABELLED], minlength=len(counts))
        yield counts
