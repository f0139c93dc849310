"""The memory formula by hand, and the stage it chooses."""

import pytest
import torch

from cluster.engine import EngineOptions
from cluster.placement import BatchPlan, PlacementSection
from cluster.zero import FITS, MAX_BUCKET, choose_stage, deepspeed_config, memory_table, state_bytes

TRAINED, FROZEN, WORKERS = 1000, 500, 4
FP32 = {
    0: (6000, 4000, 8000),
    1: (6000, 4000, 3000),
    2: (6000, 1000, 3000),
    3: (1500, 1000, 3000),
}
BF16 = {
    0: (6000, 4000, 8000),
    1: (3000, 2000, 3000),
    2: (3000, 500, 3000),
    3: (750, 500, 3000),
}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("bf16", "rows"), [(False, FP32), (True, BF16)], ids=["fp32", "bf16"])
def test_state_bytes_are_the_rows_of_the_formula(stage: int, bf16: bool, rows: dict[int, tuple[int, int, int]]) -> None:
    need = state_bytes(stage, TRAINED, FROZEN, WORKERS, bf16)
    assert (need.parameters, need.gradients, need.optimizer) == rows[stage]
    assert need.total == sum(rows[stage])


def test_state_of_one_worker_is_not_split() -> None:
    assert state_bytes(3, TRAINED, 0, 1, True) == state_bytes(1, TRAINED, 0, 1, True)


@pytest.mark.parametrize(
    ("room", "stage"), [(18_000, 0), (13_000, 1), (10_000, 2), (9_999, 3), (0, 3)], ids=lambda value: str(value)
)
def test_auto_takes_the_lowest_stage_that_fits(room: int, stage: int) -> None:
    # Totals of FP32 above: 18000, 13000, 10000, 5500; state may take the FITS share of a device.
    device = int(room / FITS) + 1 if room else 0
    device -= 2 if room == 9_999 else 0
    assert choose_stage(PlacementSection(workers=WORKERS), TRAINED, FROZEN, False, device) == stage


def test_a_stage_asked_for_is_taken_whether_it_fits_or_not() -> None:
    for stage in (0, 1, 2, 3):
        assert choose_stage(PlacementSection(zero_stage=stage), TRAINED, FROZEN, False, 0) == stage


def test_memory_table_marks_the_chosen_stage_and_adds_up() -> None:
    lines = memory_table(2**20, 0, 2, False, 2)
    assert [line.endswith("<- used") for line in lines] == [False, False, True, False]
    assert lines[2].startswith("ZeRO 2: 4.0 weights + 2.0 gradients + 6.0 optimizer = 12.0 MiB")


def options(stage: int, bf16: bool, clip_norm: float, placement: PlacementSection) -> EngineOptions:
    plan = BatchPlan(global_batch=24, workers=2, micro_batch=3, accumulation=4)
    return EngineOptions(plan, placement, stage, clip_norm, bf16, torch.device("cpu"), ("exp_avg", "exp_avg_sq"))


def test_deepspeed_config_carries_the_batch_arithmetic_and_offload() -> None:
    config = deepspeed_config(options(3, True, 1.5, PlacementSection(gpus_per_worker=1, offload="all")), TRAINED)
    assert config["train_batch_size"] == 24
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 2 == 24
    assert config["gradient_clipping"] == 1.5 and config["bf16"] == {"enabled": True}
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["offload_param"] == config["zero_optimization"]["offload_optimizer"]
    unsharded = deepspeed_config(options(0, True, 1.5, PlacementSection()), TRAINED)
    assert "bf16" not in unsharded and unsharded["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    plain = deepspeed_config(options(1, False, 0.0, PlacementSection()), TRAINED)
    assert "bf16" not in plain and "offload_optimizer" not in plain["zero_optimization"]


@pytest.mark.parametrize(("num_trained", "bucket"), [(TRAINED, TRAINED), (10**10, MAX_BUCKET)])
def test_reduction_bucket_is_no_larger_than_the_gradients(num_trained: int, bucket: int) -> None:
    config = deepspeed_config(options(2, False, 1.0, PlacementSection()), num_trained)
    assert config["zero_optimization"]["reduce_bucket_size"] == bucket
