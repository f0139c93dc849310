"""One engine seam for the training loop: forward, backward, step, and every weight and optimizer state by name.

Two implementations stand behind it, held to one contract test: plain data parallel torch, and DeepSpeed ZeRO 0-3. State
goes in and out by parameter name in full fp32 tensors, so a checkpoint written by one engine, stage and worker count
continues on any other. Methods marked *collective* must be called by all ranks together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.placement import BatchPlan, PlacementSection

MASTER = "master"


@dataclass(frozen=True)
class EngineOptions:
    """What both engines need beside the model and the optimizer."""

    batch: BatchPlan
    placement: PlacementSection
    stage: int
    clip_norm: float
    bf16: bool
    device: torch.device
    state_names: tuple[str, ...]
    """Optimizer state kept for each parameter (exp_avg, exp_avg_sq; or momentum_buffer)."""


class Engine(Protocol):
    """What the training loop may use."""

    module: nn.Module
    masters: list[Tensor]

    def forward(self, *inputs: Tensor) -> Tensor: ...

    def backward(self, loss: Tensor, last: bool) -> None: ...

    def gradients_finite(self) -> bool: ...

    def step(self, rate_factor: float) -> float: ...

    def get(self, name: str, kind: str) -> Tensor: ...

    def put(self, name: str, kind: str, value: Tensor) -> None: ...

    def refresh(self) -> None: ...

    def prime(self, one_step: Callable[[], None], steps_done: int) -> None: ...

    def state_bytes(self) -> dict[str, int]: ...


def make_engine(model: nn.Module, optimizer: torch.optim.Optimizer, options: EngineOptions) -> Engine:
    """Wrap a model and its optimizer as `placement.engine` says; the process group must exist already."""
    if options.placement.engine == "torch":
        return TorchEngine(model, optimizer, options)
    from cluster.zero_engine import ZeroEngine

    return ZeroEngine(model, optimizer, options)


def set_rates(optimizer: Any, factor: float) -> None:
    """Set every group's rate to its peak times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


class TorchEngine:
    """Plain torch: DistributedDataParallel over several workers, autocast for bf16, fp32 weights as masters."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, options: EngineOptions) -> None:
        self.module = model.to(options.device)
        self.options = options
        self.optimizer = optimizer
        self.by_name = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters: list[Tensor] = list(self.by_name.values())
        self._norm = torch.tensor(0.0)
        self._wrapped: nn.Module = self.module
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._wrapped = nn.parallel.DistributedDataParallel(self.module, gradient_as_bucket_view=True)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the prediction; gradients are tracked as the caller's grad mode says."""
        with torch.autocast(self.options.device.type, torch.bfloat16, enabled=self.options.bf16):
            # DDP's forward prepares a reduction that only a backward pass ends, so without gradients it is left out.
            module = self._wrapped if torch.is_grad_enabled() else self.module
            return module(*inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate one micro batch; `last` says that the step follows, and only then ranks are averaged."""
        scaled = loss / self.options.batch.accumulation
        if isinstance(self._wrapped, nn.parallel.DistributedDataParallel):
            self._wrapped.require_backward_grad_sync = last
        scaled.backward()
        if isinstance(self._wrapped, nn.parallel.DistributedDataParallel):
            self._wrapped.require_backward_grad_sync = True

    def gradients_finite(self) -> bool:
        """Whether this rank's gradients can be used; to be asked between the last backward and the step."""
        gradients = [p.grad for p in self.by_name.values() if p.grad is not None]
        self._norm = torch.nn.utils.get_total_norm(gradients)
        return bool(torch.isfinite(self._norm))

    def step(self, rate_factor: float) -> float:
        """Clip, move the weights, clear the gradients; return the gradient norm before clipping."""
        if self.options.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(list(self.by_name.values()), self.options.clip_norm, self._norm)
        set_rates(self.optimizer, rate_factor)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(self._norm)

    def get(self, name: str, kind: str) -> Tensor:
        """Return a full fp32 tensor of one parameter: MASTER or an optimizer state. Collective."""
        parameter = self.by_name[name]
        if kind == MASTER:
            return parameter.detach().float()
        state: Tensor = self.optimizer.state[parameter][kind]
        return state

    @torch.no_grad()
    def put(self, name: str, kind: str, value: Tensor) -> None:
        """Write a full tensor of one parameter: MASTER or an optimizer state. Collective."""
        self.get(name, kind).copy_(value)

    def refresh(self) -> None:
        """Derive the working weights from the masters; here they are the same tensors."""

    def prime(self, one_step: Callable[[], None], steps_done: int) -> None:
        """Make optimizer state exist, by one step at rate zero, and count it as `steps_done`. Collective."""
        prime_optimizer(self.optimizer, one_step, steps_done)

    def state_bytes(self) -> dict[str, int]:
        """Measured bytes of this worker's weights, gradients and optimizer state."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return {
            "parameters": tensor_bytes(self.module.parameters()),
            "gradients": tensor_bytes(gradients),
            "optimizer": tensor_bytes(optimizer_tensors(self.optimizer)),
        }


def prime_optimizer(optimizer: Any, one_step: Callable[[], None], steps_done: int) -> None:
    """Run `one_step` with all rates and decays at zero, then set the step counters."""
    kept = [(group["peak_lr"], group["weight_decay"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["peak_lr"], group["weight_decay"] = 0.0, 0.0
    one_step()
    for group, (rate, decay) in zip(optimizer.param_groups, kept, strict=True):
        group["peak_lr"], group["weight_decay"] = rate, decay
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"].fill_(steps_done)
        elif "step" in state:
            state["step"] = steps_done


def optimizer_tensors(optimizer: Any) -> list[Tensor]:
    """Every state tensor of a torch optimizer."""
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def tensor_bytes(tensors: Any) -> int:
    """Bytes of distinct storages behind `tensors`."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
