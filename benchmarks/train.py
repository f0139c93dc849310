"""How fast is a training step, and how much memory does its state take? `make bench-train`.

Three loops on the same tiny model, data and global batch, two gloo workers, in turns within one run so that a drifting
machine slows all of them alike:

    plain     written the way diffusers' train_text_to_image example works: decode, encode pictures and captions in
              every step, DistributedDataParallel, unfused AdamW, clip, EMA over full weights
    uncached  the same work per step through Fresco's engine, draws, fused optimizer and sharded EMA
    cached    Fresco as `fresco train` runs it: latents and text states come from memory maps

Then ZeRO 0 to 3 against the plain torch engine: images/s, and measured bytes of state beside the formula.
"""

import io
import json
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from benchmarks.plain_loop import Clock, Step, decode, plain_loop
from benchmarks.train_tables import show

WORKERS, GLOBAL_BATCH, ROUNDS, STEPS_PER_ROUND = 2, 32, 15, 4
PICTURES = 256


def main() -> None:
    """Run every contestant on two processes and print the tables."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        result = Path(folder) / "result.json"
        print(
            f"training benchmark: {WORKERS} workers, global batch {GLOBAL_BATCH}, medians of {ROUNDS} rounds",
            flush=True,
        )
        multiprocessing.spawn(worker, args=(port, str(result)), nprocs=WORKERS)
        show(json.loads(result.read_text()))


def worker(rank: int, port: int, result: str) -> None:
    """Build the contestants in one process, let them take turns, write the numbers on rank 0."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORKERS)}
    dist.init_process_group("gloo", rank=rank, world_size=WORKERS)
    pictures, captions = draw_pictures()
    contestants: dict[str, Step] = {
        "plain": plain_loop(pictures, captions, rank, GLOBAL_BATCH // WORKERS),
        "uncached": fresco_loop(pictures, captions, rank, cached=False)[0],
        "cached": fresco_loop(pictures, captions, rank)[0],
    }
    speed = take_turns(contestants)
    stages: dict[str, Step] = {"torch": fresco_loop(pictures, captions, rank)[0]}
    engines = {}
    for stage in range(4):
        stages[f"ZeRO {stage}"], engines[stage] = fresco_loop(pictures, captions, rank, stage)
    zero = take_turns(stages)
    memory = {str(stage): measure_state(stages[f"ZeRO {stage}"], engine) for stage, engine in engines.items()}
    if rank == 0:
        Path(result).write_text(json.dumps({"speed": speed, "zero": zero, "memory": memory}))
    dist.barrier()
    dist.destroy_process_group()


def take_turns(contestants: dict[str, Step]) -> dict[str, Any]:
    """Return for each contestant its images/s in every round and the seconds of each part per step."""
    for step in contestants.values():
        step(0, Clock())
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    clocks = {name: Clock() for name in contestants}
    count = 1
    for _ in range(ROUNDS):
        for name, step in contestants.items():
            dist.barrier()
            began = time.perf_counter()
            for index in range(STEPS_PER_ROUND):
                step(count + index, clocks[name])
            dist.barrier()
            rates[name].append(GLOBAL_BATCH * STEPS_PER_ROUND / (time.perf_counter() - began))
        count += STEPS_PER_ROUND
    parts = {
        name: {part: seconds / (count - 1) for part, seconds in clock.seconds.items()} for name, clock in clocks.items()
    }
    return {name: {"rates": rates[name], "parts": parts[name]} for name in contestants}


def draw_pictures() -> tuple[list[bytes], list[str]]:
    """Return drawn emblems as PNG bytes, the way a data set on disk holds them."""
    from components.emblems import example

    files, captions = [], []
    for index in range(PICTURES):
        picture, caption = example("base", 5, index)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        files.append(buffer.getvalue())
        captions.append(caption)
    return files, captions


def make_fresco(engine: str, stage: int) -> tuple[Any, Any, Any, Any]:
    """Build Fresco's engine around the embedded base's denoiser, as `fresco train` does for the plan `denoiser`."""
    from cluster.engine import EngineOptions, make_engine
    from cluster.placement import PlacementSection, plan_batch
    from components.ema import Ema
    from components.freezing import apply_plan, parameter_groups
    from components.models import embedded_base, load_parts
    from components.objective import make_objective
    from components.optim import STATE_NAMES, make_optimizer
    from components.recipe import TrainSection

    parts = load_parts(embedded_base())
    train = TrainSection(global_batch=GLOBAL_BATCH, freezing="denoiser", steps=1000)
    model = apply_plan(parts, "denoiser", 0)
    placement = PlacementSection(workers=WORKERS, engine=engine, zero_stage=stage)
    options = EngineOptions(
        batch=plan_batch(GLOBAL_BATCH, WORKERS, 0),
        placement=placement,
        stage=stage,
        clip_norm=1.0,
        bf16=False,
        device=torch.device("cpu"),
        state_names=STATE_NAMES["adamw"],
    )
    made = make_engine(model, make_optimizer(model, parameter_groups(model), train), options)
    return parts, train, made, (Ema(made.masters, 0.999), make_objective(parts.prediction, parts.scheduler))


def make_tables(parts: Any, files: list[bytes], captions: list[str]) -> Any:
    """Encode everything once, as `fresco prepare` does, into what the training loop reads."""
    from components.batches import Captions, SplitData
    from components.encode import LatentsTable
    from components.models import encode_images, encode_text

    mean, spread = encode_images(parts.vae, decode(files))
    text = encode_text(parts, ["", *captions])
    table = Captions(text.states_BLD.numpy(), text.mask_BL.numpy(), np.arange(1, len(captions) + 1))
    keys = [f"{index:064x}" for index in range(len(files))]
    return SplitData(keys, LatentsTable(mean.numpy(), spread.numpy()), table)


def fresco_loop(
    files: list[bytes], captions: list[str], rank: int, stage: int | None = None, cached: bool = True
) -> tuple[Step, Any]:
    """Fresco's step and engine, plain torch (stage None) or ZeRO; from caches, or encoding online as the peer does."""
    from components.batches import training_batch
    from components.models import encode_images, encode_text
    from components.objective import squared_error

    parts, train, engine, (ema, objective) = make_fresco("torch" if stage is None else "deepspeed", stage or 0)
    data = make_tables(parts, files, captions)
    share = GLOBAL_BATCH // WORKERS
    positions = range(rank * share, (rank + 1) * share)

    def step(index: int, clock: Clock, last: bool = True) -> None:
        if not cached:
            first = (index * GLOBAL_BATCH + rank * share) % PICTURES
            with clock.part("decode"):
                pixels = decode(files[first : first + share])
            with clock.part("encode pictures"):
                encode_images(parts.vae, pixels)
            with clock.part("encode captions"):
                encode_text(parts, captions[first : first + share])
        with clock.part("draw the batch"):
            batch = training_batch(data, objective, train, index, positions)
        with clock.part("forward"):
            prediction = engine.forward(batch.noisy_BCHW, batch.timestep_B, batch.text.states_BLD, batch.text.mask_BL)
            loss = (squared_error(prediction, batch.target_BCHW) * batch.weight_B).mean()
        with clock.part("backward"):
            engine.backward(loss, last)
        if not last:
            return
        with clock.part("optimizer, clip, EMA"):
            assert engine.gradients_finite()
            engine.step(0.1)
            ema.update(index)

    return step, engine


def measure_state(step: Any, engine: Any) -> dict[str, Any]:
    """Return measured and predicted bytes between two micro batches of one step, where a worker holds most."""
    from cluster.zero import state_bytes

    step(10**6, Clock(), last=False)
    trained = sum(int(getattr(p, "ds_numel", p.numel())) for p in engine.module.parameters())
    formula = state_bytes(engine.options.stage, trained, 0, WORKERS, bf16=False)
    return {"measured": engine.state_bytes(), "formula": vars(formula)}


if __name__ == "__main__":
    main()
