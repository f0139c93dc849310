"""What do replay, averaging and anchors buy when the world drifts? `make bench-replay`.

Old is the world that the embedded base (the champion) was trained on, new has another shape and another palette. Each
way of training takes the same steps, seeds and pictures, one run on each core: the plain loop below with Fresco's own
draws, replay, objective, averages and learning-rate schedule (no Ray: placement does not change a result). Every run is
then measured on held-out pictures and captions of both worlds. Losses: mean over seeds, and half the width of Student's
95 % interval over them; from untrained weights so few steps lead nowhere, so one seed must do there. Adherence: share
of pictures that show all their caption says, all seeds together, with Wilson's 95 % interval; a caption's pictures of
several seeds are not independent, so that interval is somewhat too narrow.
"""

import argparse
import math
import multiprocessing
import os
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy import stats

BATCH, GUIDANCE, SAMPLING_STEPS = 16, 3.0, 20


@dataclass(frozen=True)
class Size:
    """How much of everything; the default is made for 11 minutes on 2 cores."""

    seeds: int = 3
    steps: int = 300
    train_old: int = 1200
    train_new: int = 600
    test: int = 40
    new_world: str = "village"


QUICK = Size(seeds=1, steps=20, train_old=120, train_new=60, test=8)


@dataclass(frozen=True)
class Arm:
    """One way of training on what has arrived."""

    name: str
    share: float | None = 0.0
    """Of old pictures in a batch; None: old and new pictures alike, whatever their numbers."""
    average: float = 0.0
    """Of the champion's weights in the exported ones."""
    cold: bool = False
    """From untrained weights, as the base itself began, instead of from the champion."""


ARMS = (
    Arm("new pictures alone"),
    Arm("replay 0.1", 0.1),
    Arm("replay 0.25", 0.25),
    Arm("replay 0.5", 0.5),
    Arm("new pictures alone, averaging 0.2", average=0.2),
    Arm("old and new alike", None),
    Arm("anchor: from nothing, old and new alike", None, cold=True),
    Arm("from nothing, new pictures alone", cold=True),
)


@dataclass(frozen=True)
class Measured:
    """What a model does on one world: losses (N,) of held-out pictures, and whether each caption's picture shows it."""

    losses_N: np.ndarray
    shown_N: np.ndarray


def main() -> None:
    """Train, measure, print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a minute, to see that it runs; its numbers mean nothing")
    size = QUICK if parser.parse_args().quick else Size()
    began = time.monotonic()
    data, tests = make_data(size)
    champion = measure(load(cold=False, seed=0), tests)
    runs = [(arm, seed) for arm in ARMS for seed in range(1 if arm.cold else size.seeds)]
    # A model this small draws and learns faster on one thread for each run than on all threads for one.
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), keep, (data, tests, size)) as pool:
        found = pool.starmap(train, runs, chunksize=1)
    table = {arm: [one for one, (its, _) in zip(found, runs, strict=True) if its == arm] for arm in ARMS}
    print(
        f"\n{size.steps} steps of {BATCH} ({size.train_new} new pictures, {size.train_old} old), {size.seeds} seeds,"
        f" {size.test} held-out pictures and captions of each world; {time.monotonic() - began:.0f} s\n"
    )
    print("| training | loss on new | loss on old | forgetting | adherence on new words | on old words |")
    print("|---|---|---|---|---|---|")
    print(row("the champion, untouched", [champion], champion))
    for arm, found in table.items():
        print(row(arm.name, found, champion))


def row(name: str, found: list[dict[str, Measured]], champion: dict[str, Measured]) -> str:
    """One line of the table; forgetting is the loss on old pictures above the champion's, as a share of it."""
    level = float(champion["old"].losses_N.mean())
    new, old = (np.array([float(one[world].losses_N.mean()) for one in found]) for world in ("new", "old"))
    cells = [told(new, "{:.4f}"), told(old, "{:.4f}"), told(old / level - 1, "{:+.1%}")]
    return f"| {' | '.join([name, *cells, *(adherence(found, world) for world in ('new', 'old'))])} |"


def told(values: np.ndarray, form: str) -> str:
    """Mean over seeds, with half the width of its interval where there are several."""
    text = form.format(float(values.mean()))
    if len(values) == 1:
        return text
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return f"{text} ± {form.replace('+', '').format(half)}"


def adherence(found: list[dict[str, Measured]], world: str) -> str:
    from components.metrics import proportion_wilson

    shown = np.concatenate([one[world].shown_N for one in found])
    share = proportion_wilson(int(shown.sum()), len(shown))
    return f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"


def make_data(size: Size) -> tuple[Any, dict[str, Any]]:
    """Encode drawn emblems once: one training table with old rows first, and both worlds' held-out pictures."""
    from components.batches import SplitData, live_captions
    from components.emblems import example
    from components.encode import LatentsTable
    from components.images import to_pixels
    from components.models import embedded_base, encode_images, load_parts
    from components.replay import OldAndNew

    parts = load_parts(embedded_base())

    def encoded(world: str, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        drawn = [example(world, 11, first + index) for index in range(count)]
        pixels = torch.from_numpy(to_pixels([picture for picture, _ in drawn]))
        encoded = (encode_images(parts.vae, part) for part in pixels.split(32))
        means, spreads = (torch.cat(rows) for rows in zip(*encoded, strict=True))
        return means, spreads, [caption for _, caption in drawn]

    old, new = encoded("base", 0, size.train_old), encoded(size.new_world, 0, size.train_new)
    latents = LatentsTable(*(torch.cat([old[part], new[part]]).numpy() for part in (0, 1)))
    captions = [*old[2], *new[2]]
    split = OldAndNew(np.arange(size.train_old), np.arange(size.train_old, len(captions)))
    keys = [f"{index:064x}" for index in range(len(captions))]
    data = SplitData(keys, latents, live_captions(parts, captions), split)
    tests = {}
    held_out = [f"{index:016x}{'0' * 48}" for index in range(size.test)]
    for world, name in (("old", "base"), ("new", size.new_world)):
        means, _, texts = encoded(name, 100_000, size.test)
        tests[world] = {"means": means.numpy(), "captions": texts, "keys": held_out}
    return data, tests


def load(cold: bool, seed: int) -> Any:
    """The champion's parts, or parts of the same kind that have learned nothing but the autoencoder."""
    from components.models import embedded_base, load_parts
    from flows.pretrain import make_untrained

    parts = load_parts(embedded_base())
    return make_untrained(parts.tokenizer, parts.vae, seed) if cold else parts


def recipe(arm: Arm, size: Size, seed: int) -> Any:
    """What `flows.continual.continued` would set, with the demo's rates."""
    from components.recipe import LearningRate, TrainSection

    return TrainSection(
        steps=size.steps,
        global_batch=BATCH,
        freezing="all",
        learning_rate=LearningRate(denoiser=2e-3, text_encoder=1e-3),
        warmup_steps=min(20, size.steps // 10),
        replay_of="base" if arm.share is not None else "",
        replay_fraction=arm.share or 0.0,
        average_with_base=arm.average,
        ema_decay=0.99,
        seed=seed,
    )


_kept: dict[str, Any] = {}


def keep(data: Any, tests: dict[str, Any], size: Size) -> None:
    """Hold what all runs of this process share."""
    torch.set_num_threads(1)
    _kept.update(data=data, tests=tests, size=size)


def train(arm: Arm, seed: int) -> dict[str, Measured]:
    """Train one way with one seed; return what the exported weights do on both worlds."""
    from components.batches import training_batch
    from components.ema import Ema
    from components.freezing import apply_plan, parameter_groups
    from components.objective import make_objective, squared_error
    from components.optim import make_optimizer, rate_factor

    began = time.monotonic()
    data, tests, size = (_kept[name] for name in ("data", "tests", "size"))
    parts, plan = load(arm.cold, seed), recipe(arm, size, seed)
    model = apply_plan(parts, plan.freezing, seed)
    optimizer = make_optimizer(model, parameter_groups(model), plan)
    masters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ema, goal = Ema(masters, plan.ema_decay, plan.average_with_base), make_objective(parts.prediction, parts.scheduler)
    data = data if arm.share is not None else replace(data, parts=None)
    model.train()
    for step in range(plan.steps):
        batch = training_batch(data, goal, plan, step, range(BATCH))
        prediction = model(batch.noisy_BCHW, batch.timestep_B, batch.text.states_BLD, batch.text.mask_BL)
        (squared_error(prediction, batch.target_BCHW) * batch.weight_B).mean().backward()
        torch.nn.utils.clip_grad_norm_(masters, plan.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate_factor(plan, step)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(step)
    model.eval()
    trained_s = time.monotonic() - began
    with ema.exported():
        found = measure(parts, tests)
    numbers = ", ".join(
        f"{world}: loss {one.losses_N.mean():.4f}, {one.shown_N.mean():.0%} shown" for world, one in found.items()
    )
    measured_s = time.monotonic() - began - trained_s
    print(f"{arm.name}, seed {seed}: {numbers}; {trained_s:.0f} + {measured_s:.0f} s", flush=True)
    return found


def measure(parts: Any, tests: dict[str, Any]) -> dict[str, Measured]:
    """Losses and pictures of the held-out captions of both worlds; picture i of a world has seed i for every model."""
    return {world: _measure(parts, test) for world, test in tests.items()}


@torch.no_grad()
def _measure(parts: Any, test: dict[str, Any]) -> Measured:
    from components.emblem_reader import shows
    from components.emblems import parse_caption
    from components.models import encode_text, family_named
    from components.objective import make_objective, per_image_losses
    from components.sampler import PictureRequest, draw

    family, captions = family_named(parts.family), test["captions"]

    def predict(latents: torch.Tensor, timesteps: torch.Tensor, text: Any) -> torch.Tensor:
        found: torch.Tensor = family.call_denoiser(parts.denoiser, latents, timesteps, text)
        return found

    text = encode_text(parts, captions)
    goal = make_objective(parts.prediction, parts.scheduler)
    losses = per_image_losses(goal, predict, test["means"], test["keys"], lambda rows: text.rows(list(rows)))
    wishes = [
        PictureRequest(caption, seed=seed, steps=SAMPLING_STEPS, guidance_scale=GUIDANCE, width_px=64, height_px=64)
        for seed, caption in enumerate(captions)
    ]
    pictures = zip(draw(parts, wishes), captions, strict=True)
    emblems = ((picture, parse_caption(caption)) for picture, caption in pictures)
    return Measured(losses.mean(axis=1), np.array([emblem is not None and shows(p, emblem) for p, emblem in emblems]))


if __name__ == "__main__":
    main()
