"""The batch arithmetic and the placements that can never run."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.errors import PlacementError
from cluster.placement import BatchPlan, PlacementSection, ServeSection, check_placement, plan_batch


@given(workers=st.integers(1, 16), micro=st.integers(1, 16), accumulation=st.integers(1, 8))
def test_plan_multiplies_back_to_the_global_batch(workers: int, micro: int, accumulation: int) -> None:
    batch = workers * micro * accumulation
    plan = plan_batch(batch, workers, micro)
    assert plan == BatchPlan(batch, workers, micro, accumulation)
    assert plan.per_worker * workers == batch


def test_plan_without_a_micro_batch_takes_a_workers_whole_share() -> None:
    plan = plan_batch(32, 4, 0)
    assert (plan.micro_batch, plan.accumulation) == (8, 1)
    assert str(plan) == "global batch 32 = 4 workers x micro batch 8 x 1 accumulation steps"


def test_batch_that_does_not_divide_by_workers_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(PlacementError, match=r"32 / 3 = 10\.67; set train\.global_batch to a multiple of 3"):
        plan_batch(32, 3, 0)


@pytest.mark.parametrize(("micro", "quotient"), [(3, "5.33"), (32, "0.50")])
def test_micro_batch_that_does_not_divide_is_refused_with_what_would(micro: int, quotient: str) -> None:
    with pytest.raises(PlacementError, match=rf"16 each, and 16 / {micro} = {quotient}.*one of 1, 2, 4, 8, 16$"):
        plan_batch(32, 2, micro)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_stage": 4}, "auto, 0, 1, 2 or 3, found 4"),
        ({"zero_stage": -1}, "auto, 0, 1, 2 or 3, found -1"),
        ({"offload": "optimizer"}, "on CPU workers"),
        ({"offload": "optimizer", "gpus_per_worker": 1, "engine": "torch"}, "needs placement.engine=deepspeed"),
        ({"offload": "optimizer", "gpus_per_worker": 1, "zero_stage": 0}, "zero_stage 1, 2 or 3"),
        ({"offload": "all", "gpus_per_worker": 1, "zero_stage": 2}, "needs placement.zero_stage 3"),
    ],
)
def test_placements_that_can_never_run_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        check_placement(PlacementSection(**settings))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"zero_stage": 3},
        {"engine": "torch"},
        {"offload": "optimizer", "gpus_per_worker": 1, "zero_stage": 1},
        {"offload": "all", "gpus_per_worker": 1, "zero_stage": 3},
    ],
)
def test_placements_that_can_run_are_accepted(settings: dict[str, object]) -> None:
    check_placement(PlacementSection(**settings))


@pytest.mark.parametrize("key", ["worker", "zero", "gpu"])
def test_unknown_keys_and_wrong_types_are_errors(key: str) -> None:
    with pytest.raises(ValidationError):
        PlacementSection(**{key: 1})
    with pytest.raises(ValidationError):
        PlacementSection(zero_stage="two")
    with pytest.raises(ValidationError):
        ServeSection(port=70000)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"row_buckets": [4, 2]}, "the smallest first, found"),
        ({"row_buckets": [2, 2]}, "different numbers"),
        ({"row_buckets": [2, 128]}, r"up to serve.max_batch_rows \(64\)"),
        ({"row_buckets": [0, 2]}, "greater than or equal to 1"),
        ({"row_buckets": [2], "strict": True}, "empty with serve.strict"),
        ({"precision": "fp16"}, "'auto', 'fp32' or 'bf16'"),
    ],
)
def test_calls_a_replica_cannot_make_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ServeSection(**settings)


def test_a_bound_on_pictures_at_work_below_the_largest_picture_is_refused() -> None:
    assert ServeSection(max_side_px=64, max_live_pixels=64 * 64).max_live_pixels == 4096
    with pytest.raises(ValidationError, match=r"expected at least 4096, .* \(serve.max_side_px\), found 4095"):
        ServeSection(max_side_px=64, max_live_pixels=64 * 64 - 1)


@pytest.mark.parametrize(
    ("settings", "buckets"),
    [
        ({}, ()),
        ({"row_buckets": [2, 8]}, (2, 8)),
        ({"compile": True, "max_batch_rows": 8}, (1, 2, 4, 8)),
        ({"compile": True, "max_batch_rows": 6}, (1, 2, 4, 6)),
        ({"compile": True, "row_buckets": [2, 8]}, (2, 8)),
        ({"compile": True, "strict": True}, ()),
    ],
)
def test_compiling_without_buckets_takes_powers_of_two(settings: dict[str, Any], buckets: tuple[int, ...]) -> None:
    assert ServeSection(**settings).buckets == buckets


@pytest.mark.parametrize(
    ("settings", "limit_s"),
    [
        ({}, 300.0),
        ({"row_buckets": (2, 8)}, 300.0),
        ({"row_buckets": (2, 8), "compile": True}, 780.0),
        ({"compile": True}, 1980.0),
        ({"compile": True, "strict": True}, 540.0),
    ],
)
def test_a_start_may_take_longer_the_more_is_compiled(settings: dict[str, Any], limit_s: float) -> None:
    assert ServeSection(**settings).ready_limit_s == limit_s
