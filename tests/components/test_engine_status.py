"""Limits that an engine can keep, and the sizes of its calls."""

from typing import Any

import pytest

from components.engine_status import EngineLimits
from components.errors import InputError
from components.step_batch import StepBatchEngine


@pytest.mark.parametrize(
    "limits",
    [
        {"max_batch_rows": 1},
        {"row_buckets": (4, 2)},
        {"row_buckets": (2, 2)},
        {"row_buckets": (0, 2)},
        {"row_buckets": (2, 128)},
        {"row_buckets": (2,), "strict": True},
    ],
)
def test_limits_nobody_can_keep_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected"):
        StepBatchEngine(EngineLimits(**limits))


def test_strict_mode_is_one_bucket() -> None:
    assert EngineLimits(max_batch_rows=6, strict=True).buckets == (6,)
    assert EngineLimits(row_buckets=(2, 8)).buckets == (2, 8) and EngineLimits().buckets == ()
