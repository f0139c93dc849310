"""The weights of a run in progress: averaged, saved, resumed, exported; by parameter name, whatever the engine.

Every method that touches weights is collective: under ZeRO each rank holds a part, and full tensors pass one by one.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cluster import telemetry
from cluster.checkpoints import CheckpointReader, CheckpointWriter, newest_complete, read_state, tensors_of
from cluster.engine import MASTER, Engine
from cluster.whole_folders import keep_whole
from cluster.workers import WorkerContext, peak_memory_bytes
from components.ema import Ema
from components.freezing import export
from components.models import load_parts

EMA = "ema"


@dataclass
class Progress:
    """What the loop knows besides weights; saved with every checkpoint."""

    step: int = 0
    eval_first: float = float("nan")
    eval_best: float = float("inf")
    eval_last: float = float("nan")
    best_step: int = 0
    bad_evals: int = 0
    images: int = 0
    seconds: float = 0.0

    def judge(self, eval_loss: float) -> None:
        """Take in a validation loss: first, last, best, and how many since the best."""
        self.eval_last = eval_loss
        if self.step == 0:
            self.eval_first = eval_loss
        if eval_loss < self.eval_best:
            self.eval_best, self.best_step, self.bad_evals = eval_loss, self.step, 0
        else:
            self.bad_evals += 1

    def numbers(self, loss: float, norm: float, rate: float, data_share: float) -> dict[str, Any]:
        """Return the log line of a step."""
        return {
            "step": self.step,
            telemetry.TRAIN_LOSS: loss,
            telemetry.GRAD_NORM: norm,
            telemetry.LEARNING_RATE: rate,
            telemetry.IMAGES_PER_S: self.images / max(self.seconds, 1e-9),
            telemetry.DATA_WAIT: data_share,
            telemetry.MEMORY_PEAK: peak_memory_bytes() / 2**20,
        }

    def outcome(self, stage: int, used_best: bool) -> dict[str, Any]:
        """Return what the run came to, for the verb's JSON object."""
        return {
            "steps": self.step,
            "eval_loss_first": self.eval_first,
            "eval_loss_best": self.eval_best,
            "eval_loss_last": self.eval_last,
            "exported_step": self.best_step if used_best else self.step,
            "images_per_s": self.images / max(self.seconds, 1e-9),
            "zero_stage": stage,
        }


class RunWeights:
    """Moves weights between the engine, the moving average, checkpoints and the exported pipeline."""

    def __init__(self, directory: Path, engine: Engine, ema: Ema, names: list[str], kinds: tuple[str, ...]) -> None:
        self.directory, self.engine, self.ema, self.names, self.kinds = directory, engine, ema, names, kinds

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Compute with the weights that are exported (averaged, and with the base if asked for) inside this block."""
        if not self.ema.changes_export:
            yield
            return
        with self.ema.exported():
            self.engine.refresh()
            yield
        self.engine.refresh()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield everything a checkpoint holds."""
        yield from tensors_of(self.names, self.kinds, self.engine.get)
        if self.ema.averages:
            with self.ema.swapped():
                for name in self.names:
                    yield f"{name}|{EMA}", self.engine.get(name, MASTER).clone()

    def save_best(self, progress: Progress, here: WorkerContext) -> None:
        """Keep the exported weights of the best validation loss so far."""
        writer = CheckpointWriter(self.directory / "best", here.rank, here.world_size, keep=1)
        writer.save(progress.step, ((f"{name}|{EMA}", weight) for name, weight in self.exported()), vars(progress))
        writer.close()

    def exported(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, weight) of everything that trains, as it is exported now."""
        with self.ema.exported():
            for name in self.names:
                yield name, self.engine.get(name, MASTER).clone()

    def resume(self, forward_backward: Callable[[int], Any]) -> Progress:
        """Continue from the newest complete checkpoint, whoever wrote it; a fresh start when there is none."""
        checkpoint = newest_complete(self.directory / "checkpoints")
        if checkpoint is None:
            return Progress()
        progress = Progress(**read_state(checkpoint))
        reader = CheckpointReader(checkpoint)

        def one_step() -> None:
            forward_backward(progress.step)
            self.engine.step(0.0)

        # Optimizer state must exist before it can be written: one step at rate zero makes it.
        self.engine.prime(one_step, progress.step)
        if self.ema.averages:
            for name in self.names:
                self.engine.put(name, MASTER, reader.get(f"{name}|{EMA}"))
            self.ema.restart()
        for name in self.names:
            for kind in self.kinds:
                self.engine.put(name, kind, reader.get(f"{name}|{kind}"))
        self.engine.refresh()
        return progress

    def export(self, base: Path, plan: str, use_best: bool, rank: int) -> None:
        """Write the diffusers directory `pipeline/`: rank 0 writes, all ranks give their parts."""
        best = newest_complete(self.directory / "best") if use_best else None
        weights = self._best(best) if best is not None else self.exported()
        if rank != 0:
            for _ in weights:
                pass
            return
        target = self.directory / "pipeline"
        temporary = self.directory / f"pipeline.{os.getpid()}.tmp"
        for stale in self.directory.glob("pipeline.*.tmp"):
            shutil.rmtree(stale)
        export(load_parts(base), weights, plan, temporary)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        keep_whole(target)

    def _best(self, checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
        reader = CheckpointReader(checkpoint)
        for name in self.names:
            yield name, reader.get(f"{name}|{EMA}")
