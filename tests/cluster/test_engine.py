"""The one contract of both engines: plain torch and ZeRO 0 to 3, on 1 and 2 workers, train the same model.

Two processes (gloo) are started once and go through every setup one after the other; a third stands alone for one
worker. They write what they saw, and the tests compare it. This is the slow test of the engines: 20 real steps each.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cluster import workers, zero
from cluster.checkpoints import CheckpointWriter
from cluster.engine import MASTER, EngineOptions, make_engine
from cluster.placement import PlacementSection, plan_batch
from cluster.zero import state_bytes
from components.batches import SplitData, live_captions, training_batch
from components.ema import Ema
from components.encode import LatentsTable
from components.freezing import apply_plan, parameter_groups, trainable
from components.models import make_tiny
from components.objective import make_objective, squared_error
from components.optim import STATE_NAMES, make_optimizer, rate_factor
from components.recipe import LearningRate, TrainSection
from flows.run_weights import Progress, RunWeights

STEPS, NEXT_STEPS, GLOBAL_BATCH = 20, 3, 8
CAPTIONS = ["a red circle", "a blue square", "a red square", "a blue circle"] * 3
LIMIT_S = 500
pytestmark = pytest.mark.timeout(600)  # the first test of each fixture waits for all the processes


@dataclass(frozen=True)
class Setup:
    """One way to run the same recipe."""

    engine: str
    stage: int = 0
    micro: int = 4
    workers: int = 2
    family: str = "stable_diffusion"
    optimizer: str = "adamw"
    bf16: bool = False
    clip_norm: float = 1.0
    steps: int = STEPS

    @property
    def name(self) -> str:
        kind = "torch" if self.engine == "torch" else f"zero{self.stage}"
        extra = f"-{self.family}-{self.optimizer}" + ("-bf16" if self.bf16 else "")
        return f"{kind}-micro{self.micro}-workers{self.workers}{extra}-clip{self.clip_norm:g}"


ALONE = Setup("torch", workers=1, micro=8)
TORCH, TORCH_PARTS = Setup("torch"), Setup("torch", micro=2)
ZERO = [
    Setup("deepspeed", 0, micro=2),
    *(Setup("deepspeed", stage, micro) for stage, micro in ((1, 4), (2, 2), (3, 4))),
]
MAIN = [TORCH, TORCH_PARTS, *ZERO]
Z_IMAGE = [Setup(*kind, family="z_image", steps=4) for kind in (("torch",), ("deepspeed", 2), ("deepspeed", 3))]
SGD = [Setup(*kind, optimizer="sgd", steps=6) for kind in (("torch",), ("deepspeed", 1), ("deepspeed", 2))]
BF16 = [Setup(*kind, bf16=True, steps=4) for kind in (("torch",), ("deepspeed", 0), ("deepspeed", 2), ("deepspeed", 3))]
UNCLIPPED = [Setup(*kind, clip_norm=0, steps=4) for kind in (("torch",), ("deepspeed", 2))]
TOGETHER = [*MAIN, *Z_IMAGE, *SGD, *BF16, *UNCLIPPED]
MOVES = [
    (ZERO[3], TORCH_PARTS),
    (TORCH, ZERO[3]),
    (ZERO[1], ZERO[2]),
    (ZERO[2], ZERO[0]),
    (ZERO[0], ZERO[1]),
    (SGD[0], SGD[2]),
    (SGD[2], SGD[1]),
]
"""Whose state continues where; both sides on 2 workers."""
MOVES_ALONE = [(ZERO[2], replace(ZERO[3], workers=1, micro=4)), (ZERO[3], replace(ZERO[1], workers=1, micro=8))]


BASE_SHARE = 0.25
"""Of the weights that training began with, in those that are evaluated and exported."""


class Bench:
    """One setup on one rank: the model, its engine, and the steps of the training loop."""

    def __init__(self, setup: Setup, directory: Path, rank: int) -> None:
        self.setup, self.rank = setup, rank
        self.train = TrainSection(
            steps=STEPS + NEXT_STEPS,
            global_batch=GLOBAL_BATCH,
            optimizer=setup.optimizer,
            learning_rate=LearningRate(denoiser=1e-3, text_encoder=5e-4),
            warmup_steps=2,
            caption_dropout=0.2,
        )
        parts = make_tiny(setup.family)
        self.objective = make_objective(parts.prediction, parts.scheduler)
        rng = np.random.default_rng(0)
        latents = rng.standard_normal((2, len(CAPTIONS), 4, 4, 4)).astype(np.float32)
        table = LatentsTable(latents[0], np.abs(latents[1]) * 0.1)
        keys = [f"{row:064x}" for row in range(len(CAPTIONS))]
        self.data = SplitData(keys, table, live_captions(parts, CAPTIONS))
        model = apply_plan(parts, "all", 0)
        # A frozen layer in the midst of trained ones.
        self.frozen_name = next(name for name, _ in model.named_parameters() if name.endswith(".to_q.weight"))
        self.frozen = model.get_parameter(self.frozen_name).requires_grad_(False)
        self.frozen_before = self.frozen.detach().clone()
        self.names = [name for name, _ in trainable(model)]
        self.shapes = {name: parameter.shape for name, parameter in trainable(model)}
        sizes = [sum(p.numel() for p in model.parameters() if p.requires_grad is trains) for trains in (True, False)]
        self.counts = (sizes[0], sizes[1])
        placement = PlacementSection(workers=setup.workers, engine=setup.engine, zero_stage=setup.stage)
        self.batch = plan_batch(GLOBAL_BATCH, setup.workers, setup.micro)
        kinds = STATE_NAMES[setup.optimizer]
        options = EngineOptions(
            self.batch, placement, setup.stage, setup.clip_norm, setup.bf16, torch.device("cpu"), kinds
        )
        optimizer = make_optimizer(model, parameter_groups(model), self.train)
        self.base = {name: parameter.detach().clone() for name, parameter in trainable(model)}
        self.engine = make_engine(model, optimizer, options)
        self.ema = Ema(self.engine.masters, 0.9, BASE_SHARE)
        self.weights = RunWeights(directory / setup.name, self.engine, self.ema, self.names, (MASTER, *kinds))

    def forward_backward(self, step: int, spoil: bool = False) -> float:
        """Accumulate one step's gradients; return the loss over the global batch."""
        mean = torch.zeros(1)
        for part in range(self.batch.accumulation):
            loss = self.forward(step, part)
            if spoil:
                loss = loss * float("inf")
            self.engine.backward(loss, last=part == self.batch.accumulation - 1)
            mean += loss.detach() / self.batch.accumulation
        return workers.total(mean).item() / self.setup.workers

    def forward(self, step: int, part: int = 0) -> torch.Tensor:
        """Return the loss of one micro batch."""
        first = self.rank * self.batch.per_worker + part * self.batch.micro_batch
        positions = range(first, first + self.batch.micro_batch)
        batch = training_batch(self.data, self.objective, self.train, step, positions)
        prediction = self.engine.forward(batch.noisy_BCHW, batch.timestep_B, batch.text.states_BLD, batch.text.mask_BL)
        return (squared_error(prediction, batch.target_BCHW) * batch.weight_B).mean()

    def steps(self, first: int, count: int) -> tuple[list[float], list[float]]:
        """Take optimizer steps; return losses and gradient norms."""
        losses, norms = [], []
        for step in range(first, first + count):
            losses.append(self.forward_backward(step))
            assert self.engine.gradients_finite()
            norms.append(self.engine.step(rate_factor(self.train, step)))
            self.ema.update(step)
        return losses, norms

    @cached_property
    def probe(self) -> list[torch.Tensor]:
        batch = training_batch(self.data, self.objective, self.train, 999, range(GLOBAL_BATCH))
        return [batch.noisy_BCHW, batch.timestep_B, batch.text.states_BLD, batch.text.mask_BL]

    @torch.no_grad()
    def look(self) -> torch.Tensor:
        return self.engine.forward(*self.probe).float().clone()

    def frozen_is_untouched(self) -> bool:
        if self.setup.stage == 3:
            import deepspeed

            with deepspeed.zero.GatheredParameters([self.frozen]):
                return torch.equal(self.frozen.detach(), self.frozen_before)
        return torch.equal(self.frozen.detach().float(), self.frozen_before) and self.frozen.grad is None

    def chosen(self) -> list[str]:
        """A parameter of each component and kind of group."""
        ends = (".to_k.weight", "conv_out.weight", "token_embedding.weight", "final_layer_norm.bias")
        return [name for end in ends for name in self.names if name.endswith(end)][:5] or self.names[:3]


def straight_run(bench: Bench, directory: Path) -> dict[str, Any]:
    """Train, look at everything the contract promises, save a checkpoint, and train on."""
    setup, engine, seen = bench.setup, bench.engine, {}
    start = bench.look()
    seen["losses"], seen["norms"] = bench.steps(0, setup.steps)
    seen["frozen"] = bench.frozen_is_untouched()
    trained = bench.look()
    seen["moved"] = float((trained - start).abs().max())
    with bench.weights.averaged():
        averaged = bench.look()
    seen["averaged"] = averaged.double().square().mean().item()
    seen["export_error"] = export_error(bench)
    seen["averaged_differs"] = float((averaged - trained).abs().max())
    seen["restored"] = torch.equal(bench.look(), trained)
    seen["sums"] = {
        f"{name}|{kind}": engine.get(name, kind).double().square().sum().item()
        for name in bench.chosen()
        for kind in bench.weights.kinds
    }
    seen["round_trip"] = round_trip(bench, trained)
    writer = CheckpointWriter(directory / setup.name / "checkpoints", bench.rank, setup.workers, keep=2)
    writer.save(setup.steps, bench.weights.tensors(), vars(Progress(step=setup.steps, images=7)))
    writer.close()
    workers.gather(None)
    seen["next"] = bench.steps(setup.steps, NEXT_STEPS)[0]
    # Between two micro batches, where a worker holds most: stage 1 gives up its other gradients after the last one.
    engine.backward(bench.forward(0), last=False)
    seen["state_bytes"], seen["counts"] = engine.state_bytes(), bench.counts
    bench.forward_backward(0)
    bench.engine.step(0.0)
    before = bench.look()
    bench.forward_backward(1, spoil=bench.rank == setup.workers - 1)
    noticed = workers.total(torch.tensor([float(not engine.gradients_finite())])).item()
    seen["non_finite_noticed"] = noticed > 0
    seen["unmoved_by_it"] = torch.equal(bench.look(), before)
    return seen


def export_error(bench: Bench) -> float:
    """Return the largest difference of an exported weight from what average and base make. Collective."""
    with bench.ema.swapped():
        averages = {name: bench.engine.get(name, MASTER).clone() for name in bench.names}
    exported = dict(bench.weights.exported())
    assert any(not torch.equal(exported[name], averages[name]) for name in bench.names)
    expected = {name: torch.lerp(averages[name], bench.base[name], BASE_SHARE) for name in bench.names}
    return max(float((exported[name] - expected[name]).abs().max()) for name in bench.names)


def round_trip(bench: Bench, trained: torch.Tensor) -> list[str]:
    """Write other values through the seam, read them back, and put the old ones back; return what went wrong."""
    engine, wrong = bench.engine, []
    for name in bench.chosen():
        for kind in bench.weights.kinds:
            kept = engine.get(name, kind).clone()
            if kept.shape != bench.shapes[name] or kept.dtype != torch.float32:
                wrong.append(f"{name} {kind}: {kept.dtype} {tuple(kept.shape)}")
            other = torch.linspace(-1, 1, kept.numel()).view(kept.shape) + 2.0
            engine.put(name, kind, other)
            if not torch.equal(engine.get(name, kind), other):
                wrong.append(f"{name} {kind}: not what was put")
            if kind == MASTER:
                engine.refresh()
                if torch.equal(bench.look(), trained):
                    wrong.append(f"{name}: forward pass does not see it")
            engine.put(name, kind, kept)
    engine.refresh()
    if not torch.equal(bench.look(), trained):
        wrong.append("forward pass not restored")
    return wrong


def continued_run(source: Setup, target: Setup, directory: Path, rank: int) -> dict[str, Any]:
    """Continue another setup's checkpoint; return the next losses."""
    bench = Bench(target, directory, rank)
    bench.weights.directory = directory / source.name
    progress = bench.weights.resume(bench.forward_backward)
    averages = [average.clone() for average in bench.ema.averages]
    assert bench.ema.averages and all(torch.isfinite(average).all() for average in averages)
    with bench.weights.averaged():
        averaged = bench.look().double().square().mean().item()
    return {"step": progress.step, "averaged": averaged, "next": bench.steps(progress.step, NEXT_STEPS)[0]}


def run_rank(rank: int, world: int, directory: Path) -> None:
    """Go through every setup of this world size in a process of its own; rank 0 writes what it saw."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    rendezvous = directory / f"rendezvous-{world}"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    # By default every parameter of these tiny models would stay gathered, and stage 3 would have nothing to do.
    zero.STAYS_GATHERED = 100
    seen = {}
    if world == 2:
        for setup in TOGETHER:
            seen[setup.name] = straight_run(Bench(setup, directory, rank), directory)
    for source, target in MOVES if world == 2 else MOVES_ALONE:
        seen[f"{source.name} -> {target.name}"] = continued_run(source, target, directory, rank)
    if rank == 0:
        (directory / f"seen-{world}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


def run_world(world: int, directory: Path) -> dict[str, Any]:
    context = mp.get_context("spawn")
    processes = [context.Process(target=run_rank, args=(rank, world, directory)) for rank in range(world)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(LIMIT_S)
            assert process.exitcode == 0, f"a process of {world} ended with {process.exitcode}"
    finally:
        for process in processes:
            process.kill()
            process.join()
    seen: dict[str, Any] = json.loads((directory / f"seen-{world}.json").read_text())
    return seen


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What every setup saw, by name; a move's key is `from -> to`."""
    directory = tmp_path_factory.mktemp("engines")
    yield run_world(2, directory) | run_world(1, directory)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The reference: plain torch, one worker, no process group, one micro batch."""
    directory = tmp_path_factory.mktemp("alone")
    return straight_run(Bench(ALONE, directory, 0), directory)


def named(setups: list[Setup]) -> Any:
    return pytest.mark.parametrize("setup", setups, ids=lambda setup: setup.name)


@named(MAIN)
def test_losses_equal_one_workers(setup: Setup, alone: dict[str, Any], seen: dict[str, Any]) -> None:
    ours, reference = seen[setup.name]["losses"], alone["losses"]
    assert ours[0] == pytest.approx(reference[0], rel=1e-5)
    assert ours == pytest.approx(reference, rel=1e-4)
    assert reference[-1] != pytest.approx(reference[0], rel=1e-2)


@named(MAIN)
def test_gradient_norms_before_clipping_equal_one_workers(
    setup: Setup, alone: dict[str, Any], seen: dict[str, Any]
) -> None:
    assert seen[setup.name]["norms"] == pytest.approx(alone["norms"], rel=1e-3)
    assert max(alone["norms"]) > 1.0, "the clipping must have had something to do"


@named(MAIN)
def test_weights_and_optimizer_state_equal_one_workers(
    setup: Setup, alone: dict[str, Any], seen: dict[str, Any]
) -> None:
    # Adam divides by the root of small second moments: weights drift faster than losses.
    for key, value in alone["sums"].items():
        assert seen[setup.name]["sums"][key] == pytest.approx(value, rel=2e-3, abs=1e-12), key
    assert len(alone["sums"]) >= 9


@pytest.mark.parametrize("group", [Z_IMAGE, SGD, UNCLIPPED], ids=["z_image", "sgd", "unclipped"])
def test_engines_agree_on_other_recipes(group: list[Setup], seen: dict[str, Any]) -> None:
    reference = seen[group[0].name]
    for setup in group[1:]:
        assert seen[setup.name]["losses"] == pytest.approx(reference["losses"], rel=1e-4)
        assert seen[setup.name]["norms"] == pytest.approx(reference["norms"], rel=1e-3)


@named(BF16)
def test_bf16_is_near_fp32(setup: Setup, seen: dict[str, Any]) -> None:
    # bf16 keeps 8 bits: 1 / 256 a product, averaged over a batch.
    assert seen[setup.name]["losses"] == pytest.approx(seen[TORCH.name]["losses"][: setup.steps], rel=0.02)


@named([*MAIN, *Z_IMAGE, *BF16])
def test_averaged_weights_are_seen_inside_and_gone_after(setup: Setup, seen: dict[str, Any]) -> None:
    found = seen[setup.name]
    assert found["averaged_differs"] > 1e-5
    assert found["restored"]


@named(MAIN)
def test_averaged_weights_equal_one_workers(setup: Setup, alone: dict[str, Any], seen: dict[str, Any]) -> None:
    assert seen[setup.name]["averaged"] == pytest.approx(alone["averaged"], rel=1e-3)


@named([setup for setup in TOGETHER if not setup.bf16])
def test_exported_weights_hold_the_bases_share(setup: Setup, seen: dict[str, Any]) -> None:
    assert seen[setup.name]["export_error"] < 1e-6


@named(TOGETHER)
def test_state_read_written_and_read_again_is_the_same(setup: Setup, seen: dict[str, Any]) -> None:
    assert seen[setup.name]["round_trip"] == []


@named(TOGETHER)
def test_non_finite_gradient_of_one_worker_is_noticed_before_any_weight_moves(
    setup: Setup, seen: dict[str, Any]
) -> None:
    assert seen[setup.name]["non_finite_noticed"]
    assert seen[setup.name]["unmoved_by_it"]


@named([setup for setup in TOGETHER if not setup.bf16])
def test_frozen_weights_are_bit_identical_and_trained_ones_have_moved(setup: Setup, seen: dict[str, Any]) -> None:
    assert seen[setup.name]["frozen"]
    assert seen[setup.name]["moved"] > 1e-3


@pytest.mark.parametrize("move", [*MOVES, *MOVES_ALONE], ids=lambda move: f"{move[0].name} to {move[1].name}")
def test_state_of_one_engine_continues_on_another(move: tuple[Setup, Setup], seen: dict[str, Any]) -> None:
    source, target = move
    found, straight = seen[f"{source.name} -> {target.name}"], seen[source.name]
    assert found["step"] == source.steps
    assert found["next"] == pytest.approx(straight["next"], rel=1e-6)
    assert found["averaged"] == pytest.approx(straight["averaged"], rel=1e-5)


@named([TORCH, *ZERO])
def test_measured_state_is_the_formulas(setup: Setup, seen: dict[str, Any]) -> None:
    measured, (trained, frozen) = seen[setup.name]["state_bytes"], seen[setup.name]["counts"]
    expected = asdict(state_bytes(setup.stage, trained, frozen, 2, False))
    for part, found in measured.items():
        assert found == pytest.approx(expected[part], rel=0.1), part
