"""DeepSpeed ZeRO (Rajbhandari et al. 2020): the config Fresco writes, what a stage needs in memory, which one fits.

Bytes a worker needs for P trained and F frozen parameters, N workers, w bytes a working weight (4, or 2 in bf16):

    stage   working weights   gradients   master + Adam moments
    0       4 (P + F)         4 P         8 P  (fp32 weights are their own masters; bf16 is autocast)
    1       w (P + F)         w P         12 P / N
    2       w (P + F)         w P / N     12 P / N
    3       w (P + F) / N     w P / N     12 P / N

Activations and communication buckets come on top and depend on the micro batch.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.placement import PlacementSection

if TYPE_CHECKING:
    from cluster.engine import EngineOptions

STAYS_GATHERED = 10_000
"""Parameters up to this size are whole on every worker under stage 3: gathering them costs more than it saves."""
MAX_BUCKET = 50_000_000
"""Gradients reduced at a time by stages 1 and 2."""
FITS = 0.6
"""Share of a device's memory that state may take; the rest is for activations and buckets."""


@dataclass(frozen=True)
class StateBytes:
    """Memory of one worker, without activations."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def state_bytes(stage: int, trained: int, frozen: int, workers: int, bf16: bool) -> StateBytes:
    """Return the formula above for one stage; `trained` and `frozen` count parameters."""
    width = 2 if bf16 and stage >= 1 else 4
    shard = workers
    masters = 12 if stage >= 1 else 8
    return StateBytes(
        parameters=width * (trained + frozen) // (shard if stage == 3 else 1),
        gradients=width * trained // (shard if stage >= 2 else 1),
        optimizer=masters * trained // (shard if stage >= 1 else 1),
    )


def choose_stage(placement: PlacementSection, trained: int, frozen: int, bf16: bool, device_bytes: int) -> int:
    """Return the asked-for stage, or the lowest whose state fits in the FITS share of a device."""
    if placement.zero_stage != "auto":
        return placement.zero_stage
    for stage in (0, 1, 2):
        if state_bytes(stage, trained, frozen, placement.workers, bf16).total <= FITS * device_bytes:
            return stage
    return 3


def memory_table(trained: int, frozen: int, workers: int, bf16: bool, chosen: int) -> list[str]:
    """Return a line for each stage with its arithmetic in MiB, the chosen one marked."""
    lines = []
    for stage in range(4):
        need = state_bytes(stage, trained, frozen, workers, bf16)
        mib = [f"{value / 2**20:.1f}" for value in (need.parameters, need.gradients, need.optimizer, need.total)]
        mark = " <- used" if stage == chosen else ""
        lines.append(
            f"ZeRO {stage}: {mib[0]} weights + {mib[1]} gradients + {mib[2]} optimizer = {mib[3]} MiB a worker{mark}"
        )
    return lines


def keeps_gradients(options: "EngineOptions") -> bool:
    """Whether this rank's part of the reduced gradients is in reach between the last backward and the step."""
    return options.stage in (1, 2) and options.placement.offload == "none"


def deepspeed_config(options: "EngineOptions", num_trained: int) -> dict[str, Any]:
    """Return the config for `deepspeed.initialize`; the optimizer is passed beside it (a rate for each group)."""
    stage, batch, placement = options.stage, options.batch, options.placement
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": STAYS_GATHERED, "stage3_prefetch_bucket_size": 5_000_000}
    if stage in (1, 2):
        # By default the bucket is allocated with room for 500 million gradients, 2 GB, in every step.
        zero |= {"overlap_comm": False, "reduce_bucket_size": min(num_trained, MAX_BUCKET)}
        # Copying every gradient into one buffer avoids fragmented GPU memory; on CPUs it only costs time.
        zero |= {"contiguous_gradients": options.device.type != "cpu"}
    if placement.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if placement.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    if keeps_gradients(options):
        # The engine clips: DeepSpeed takes the norm tensor by tensor in double precision, 9 ms of a 210 ms step.
        zero |= {"compute_grad_norm": False}
    config: dict[str, Any] = {
        "train_batch_size": batch.global_batch,
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": 0.0 if keeps_gradients(options) else options.clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if options.bf16 and stage == 0:
        # DeepSpeed's bf16 optimizer of stage 0 keeps its masters out of reach of the safe_* API.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    elif options.bf16:
        config["bf16"] = {"enabled": True}
    return config
