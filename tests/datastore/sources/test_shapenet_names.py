"""ShapeNet's categories and parts."""

import numpy as np
import pytest

from datastore.sources import ShapeError
from datastore.sources.shapenet_names import CATEGORY_OF_SYNSET, PART_CATEGORIES, PART_NAMES, checked_parts

NUM_PARTS = (4, 2, 2, 4, 4, 3, 3, 2, 4, 2, 6, 2, 3, 3, 3, 3)


def test_there_are_55_categories_in_the_order_of_their_synsets() -> None:
    assert len(CATEGORY_OF_SYNSET) == len(set(CATEGORY_OF_SYNSET.values())) == 55
    assert list(CATEGORY_OF_SYNSET) == sorted(CATEGORY_OF_SYNSET)


def test_parts_are_named_by_category_and_number() -> None:
    assert list(PART_CATEGORIES) == sorted(PART_CATEGORIES)
    expected = [
        f"{name}/{part}" for name, count in zip(PART_CATEGORIES, NUM_PARTS, strict=True) for part in range(count)
    ]
    assert list(PART_NAMES) == expected
    assert len(PART_NAMES) == 50


def test_each_category_takes_its_own_parts_and_no_other() -> None:
    first = 0
    for label, count in enumerate(NUM_PARTS):
        own = np.arange(first, first + count, dtype=np.float64)
        assert np.array_equal(checked_parts(own, label, "a"), own)
        for foreign in (first - 1, first + count):
            with pytest.raises(
                ShapeError, match=f"a: point {count} is of part {foreign}, and {PART_CATEGORIES[label]} has"
            ):
                checked_parts(np.append(own, foreign), label, "a")
        first += count


def test_a_part_that_is_no_whole_number_is_refused() -> None:
    for wrong in (0.5, np.nan):
        with pytest.raises(ShapeError, match="a: point 1 is of part"):
            checked_parts(np.array([0, wrong]), 0, "a")
