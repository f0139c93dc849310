"""Groups of near duplicates: what is near is relative, and groups are chains."""

import numpy as np

from components.near_duplicates import duplicate_flags, duplicate_groups


def test_rows_near_each_other_are_one_group_and_the_rest_are_alone():
    rows = np.array([[0.0], [10.0], [0.2], [20.0], [0.4], [30.0]])
    groups = duplicate_groups(rows)
    assert groups[0] == groups[2] == groups[4] and len(set(groups.tolist())) == 4
    assert duplicate_flags(rows).tolist() == [1, 0, 1, 0, 1, 0]


def test_scale_and_order_change_nothing():
    rows = np.random.default_rng(0).normal(size=(40, 2))
    flags = duplicate_flags(rows)
    assert 0 < flags.sum() < 40
    assert (duplicate_flags(1000 * rows + 5) == flags).all()
    assert (duplicate_flags(rows[::-1])[::-1] == flags).all()


def test_equal_rows_are_duplicates_and_a_single_row_is_none():
    assert duplicate_flags(np.ones((5, 3))).tolist() == [1] * 5
    assert duplicate_flags(np.ones((1, 3))).tolist() == [0] and len(duplicate_groups(np.zeros((0, 3)))) == 0
