"""What the drift benchmark says of its years without drift."""

import numpy as np
import pytest

from benchmarks.drift import yearly_interval


@pytest.mark.parametrize(
    ("alarms", "low", "high"),
    [
        ([0], 0.0, 3.6889),  # Garwood's table of exact limits of a Poisson count
        ([1], 0.0253, 5.5716),
        ([5], 1.6235, 11.6683),
        ([0, 0], 0.0, 3.6889 / 2),
        ([1, 1, 1, 1, 1], 1.6235 / 5, 11.6683 / 5),
        ([0, 1, 2], 1 - 4.3027 / np.sqrt(3), 1 + 4.3027 / np.sqrt(3)),  # years differ: Student's
    ],
)
def test_no_interval_of_alarms_a_year_has_zero_width(alarms: list[int], low: float, high: float) -> None:
    assert yearly_interval(np.array(alarms)) == pytest.approx((low, high), abs=1e-4)
