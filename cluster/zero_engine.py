"""The DeepSpeed engine behind the seam of `cluster/engine.py`: ZeRO stages 0 to 3, fp32 and bf16, CPU and CUDA.

Where DeepSpeed's public API has a gap, the attribute used instead is named with its reason (DeepSpeed 0.19).
"""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cluster.engine import MASTER, EngineOptions, optimizer_tensors, prime_optimizer, set_rates, tensor_bytes
from cluster.workers import total
from cluster.zero import deepspeed_config, keeps_gradients


class ZeroEngine:
    """DeepSpeed with a client optimizer; see `Engine` for what each method promises."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, options: EngineOptions) -> None:
        deepspeed = _import_deepspeed()
        self.options = options
        self.module = model
        self.by_name = {name: p for name, p in model.named_parameters() if p.requires_grad}
        num_trained = sum(parameter.numel() for parameter in self.by_name.values())
        config = deepspeed_config(options, num_trained)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.sharded = options.stage > 0
        if options.stage == 3:
            _gather_embeddings_early(model)
        self.masters: list[Tensor] = self._find_masters()
        self.keeps_gradients = keeps_gradients(options)
        self._norm = torch.tensor(0.0)
        self._bad = torch.zeros((), device=options.device)
        for parameter in () if self.keeps_gradients else self.by_name.values():
            parameter.register_hook(self._watch)

    def _find_masters(self) -> list[Tensor]:
        # The flat fp32 shards this rank owns; the safe_* API only reaches them parameter by parameter.
        if not self.sharded:
            return list(self.by_name.values())
        for attribute in (
            "fp32_partitioned_groups_flat",
            "single_partition_of_fp32_groups",
            "fp32_groups_flat_partition",
        ):
            if hasattr(self.optimizer, attribute):
                return list(getattr(self.optimizer, attribute))
        raise AssertionError(f"no fp32 shards known in {type(self.optimizer).__name__}")

    def _watch(self, gradient: Tensor) -> None:
        # Gradients are freed as they are reduced, so a non-finite one is noticed as it passes: x * 0 is nan for it.
        self._bad += gradient.detach().float().sum() * 0

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.options.bf16 and self.sharded:
            inputs = tuple(x.bfloat16() if x.dtype == torch.float32 and x.ndim > 1 else x for x in inputs)
        self.engine.train(torch.is_grad_enabled())
        return self.engine(*inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)
        if not last:
            self.engine.step()

    def gradients_finite(self) -> bool:
        if self.keeps_gradients:
            # In fp32 whatever the gradients are: a bf16 norm has two digits.
            norms = torch._foreach_norm(self._reduced_gradients(), dtype=torch.float32)
            self._norm = torch.linalg.vector_norm(torch.stack(norms))
            return bool(torch.isfinite(self._norm))
        return not bool(torch.isnan(self._bad))

    def step(self, rate_factor: float) -> float:
        set_rates(self.optimizer, rate_factor)
        norm = None
        if not self.sharded:  # stage 0 clips without telling the norm
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.by_name.values() if p.grad is not None])
        if self.keeps_gradients:
            norm = self._clip()
        self.engine.step()
        self._bad.zero_()
        self._link_states()
        return float(self.engine.get_global_grad_norm() if norm is None else norm)

    def _clip(self) -> Tensor:
        """Scale this rank's part by the norm over all parts, which `gradients_finite` has taken; return that norm."""
        norm = total(self._norm.square()).sqrt()
        if self.options.clip_norm:
            torch._foreach_mul_(self._reduced_gradients(), torch.clamp(self.options.clip_norm / (norm + 1e-6), max=1.0))
        return norm

    def _link_states(self) -> None:
        # With several groups DeepSpeed links their optimizer states after the first group's step, when the others have
        # none yet, and the safe_* API then finds no exp_avg for them. Linking again once cures it (stages 1 and 2).
        optimizer = self.optimizer
        if getattr(optimizer, "_hp_optimizer_states_linked", False) and not hasattr(self, "_linked"):
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()
            self._linked = True

    def get(self, name: str, kind: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self.by_name[name]
        if not self.sharded:
            return parameter.detach() if kind == MASTER else self.optimizer.state[parameter][kind]
        if kind == MASTER:
            value = safe_get_full_fp32_param(parameter)
        else:
            value = safe_get_full_optimizer_state(parameter, kind)
        assert value is not None, f"{name} has no {kind}"
        shape = getattr(parameter, "ds_shape", parameter.shape)
        return value.detach().float().view(shape)

    @torch.no_grad()
    def put(self, name: str, kind: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        parameter = self.by_name[name]
        value = value.to(self.options.device)
        if not self.sharded:
            self.get(name, kind).copy_(value)
        elif kind == MASTER:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)

    @torch.no_grad()
    def refresh(self) -> None:
        # Writing masters leaves the weights of the forward pass as they were until the next step; these are the
        # methods that the steps of stages 1, 2 and 3 end with.
        if self.options.stage == 3:
            # Gathered copies of the old values must go first: a gather skips what it believes to have.
            self.optimizer.parameter_offload.partition_all_parameters()
            for group in range(len(self.masters)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
            persistent = self.optimizer.persistent_parameters
            if persistent:
                persistent[0].all_gather(persistent)
        elif self.sharded:
            self.optimizer.update_lp_params()

    def prime(self, one_step: Callable[[], None], steps_done: int) -> None:
        prime_optimizer(self.optimizer, one_step, steps_done)
        # prime_optimizer sees the wrapper's state; the wrapped optimizer is where stage 3 keeps it.
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        for state in inner.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"].fill_(steps_done)

    def _reduced_gradients(self) -> list[Tensor]:
        """This rank's part of the gradients, wherever the stage keeps them: between micro batches, or before a step."""
        kept: list[Tensor] = []
        for name in ("averaged_gradients", "all_grad_tensors"):
            for group in getattr(self.optimizer, name, {}).values():
                kept += [gradient for gradient in group or [] if gradient is not None]
        return kept

    def state_bytes(self) -> dict[str, int]:
        """Measured bytes of this worker's weights, gradients and optimizer state (masters included when sharded)."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        parameters: list[Tensor] = [getattr(p, "ds_tensor", p.data) for p in self.module.parameters()]
        gradients: list[Tensor] = [p.grad for p in self.module.parameters() if p.grad is not None]
        gradients += self._reduced_gradients()
        state = optimizer_tensors(inner) + (self.masters if self.sharded else [])
        return {
            "parameters": tensor_bytes(parameters),
            "gradients": tensor_bytes(gradients),
            "optimizer": tensor_bytes(state),
        }


def _gather_embeddings_early(model: nn.Module) -> None:
    """Have stage 3 gather the tables of a module of nothing but embeddings when that module is entered.

    transformers' CLIP compares the length of a prompt with the shape of its position table before it calls the table,
    which is when stage 3 would gather it: until then the shape is empty.
    """
    register = _import_deepspeed().zero.register_external_parameter
    for module in model.modules():
        parts = list(module.children())
        if parts and all(isinstance(part, nn.Embedding) for part in parts):
            for part in parts:
                register(module, part.weight)


def _import_deepspeed() -> Any:
    """Import DeepSpeed quietly, without its compiled shared-memory collective on CPU workers."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch 2.13 renamed; the warning would be printed at every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # That op is compiled at first use (a minute, needs g++) and gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
