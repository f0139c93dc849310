"""How often does the gate promote an equal recipe, and how often a better one? `make bench-gate`.

Real runs of the embedded base on the drifted emblems, in this process: the denoiser is fine-tuned by the plain loop
below, with Fresco's own draws, objective, averaging and learning-rate schedule (no Ray, no sharding: placement does
not change a result). 24 runs of one recipe with other seeds give 276 pairs of equal recipes; 12 runs with twice the
steps are truly better. Every run is measured on the same test pictures; every pair goes through `check_improvement`.
Pairs share runs, so their number overstates the evidence: an interval over runs (jackknife) stands beside the binomial.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import special, stats

EQUAL_RUNS, BETTER_RUNS, STEPS, BATCH = 24, 12, 50, 16
TRAIN_PICTURES, TEST_PICTURES = 400, 120


def main() -> None:
    """Train, measure, print the tables as Markdown."""
    torch.set_num_threads(max(1, torch.get_num_threads()))
    data, test = make_data()
    equal = np.stack([run(data, test, seed, STEPS) for seed in range(EQUAL_RUNS)])
    better = np.stack([run(data, test, 1000 + seed, 2 * STEPS) for seed in range(BETTER_RUNS)])
    spread = float(equal.mean(axis=1).std(ddof=1) / equal.mean())
    gain = 1 - float(better.mean() / equal.mean())
    print(
        f"\nloss {equal.mean():.4f}; spread between {EQUAL_RUNS} seeds: {spread:.2%}; twice the steps: {gain:.2%} lower"
    )
    print(
        "\n| pictures | gate | equal promoted (binomial 95 %; jackknife 95 % over runs) | better promoted | predicted |"
    )
    print("|---|---|---|---|---|")
    for n, (name, gate) in itertools.product((30, 60, TEST_PICTURES), gates(spread).items()):
        show(n, name, gate, equal[:, :n], better[:, :n])


def gates(spread: float) -> dict[str, Any]:
    """The default, the default with the spread measured here, and one without the seeds' part for contrast."""
    from components.recipe import GateSection

    return {
        "default": GateSection(),
        "measured spread, no margin": GateSection(min_improvement=0, seed_spread=spread),
        "pictures alone": GateSection(min_improvement=0, seed_spread=0),
    }


def show(n: int, name: str, gate: Any, equal_RN: np.ndarray, better_SN: np.ndarray) -> None:
    """One row: rates over all pairs, both ways round for equal recipes, since either may be the champion."""
    runs = range(len(equal_RN))
    won = np.array([[i != j and promotes(equal_RN[i], equal_RN[j], gate) for j in runs] for i in runs])
    pairs = len(runs) * (len(runs) - 1)
    low, high = stats.binomtest(int(won.sum()), pairs).proportion_ci(method="wilson")
    without = [np.delete(np.delete(won, i, 0), i, 1).sum() / ((len(runs) - 1) * (len(runs) - 2)) for i in runs]
    half = 1.96 * math.sqrt((len(runs) - 1) * np.var(without))
    found = np.mean([promotes(ours, theirs, gate) for ours in better_SN for theirs in equal_RN])
    rate = won.mean() * len(runs) / (len(runs) - 1)
    told = f"{rate:.1%} of {pairs} ({low:.1%} to {high:.1%}; ±{half:.1%})"
    power = predicted(gate, equal_RN, better_SN)
    print(f"| {n} | {name} | {told} | {found:.1%} of {len(better_SN) * len(equal_RN)} | {power:.1%} |")


def promotes(candidate_N: np.ndarray, champion_N: np.ndarray, gate: Any) -> bool:
    from components.evidence import Losses
    from components.policy import check_improvement

    return check_improvement(Losses("bench", candidate_N, champion_N), gate).outcome == "pass"


def predicted(gate: Any, equal_RN: np.ndarray, better_SN: np.ndarray) -> float:
    """Power for runs drawn at random: the test pictures are the same for every pair, so only the runs vary."""
    from components.policy import seed_width

    n, level = equal_RN.shape[1], float(equal_RN.mean())
    excess = float(better_SN.mean()) - (1 - gate.min_improvement) * level
    between = better_SN[:, None] - (1 - gate.min_improvement) * equal_RN[None]
    error = float(between.std(axis=2, ddof=1).mean()) / math.sqrt(n)
    seeds = math.sqrt(better_SN.mean(axis=1).var(ddof=1) + equal_RN.mean(axis=1).var(ddof=1))
    limit = math.hypot(float(stats.t.ppf(1 - gate.significance, n - 1)) * error, seed_width(level, gate))
    return float(special.ndtr((-excess - limit) / seeds))


def make_data() -> tuple[Any, dict[str, Any]]:
    """Encode drawn emblems once: training tables, and the test pictures with their captions' states."""
    from components.batches import Captions, SplitData
    from components.emblems import example
    from components.encode import LatentsTable
    from components.images import to_pixels
    from components.models import embedded_base, encode_images, encode_text, load_parts

    parts = load_parts(embedded_base())
    drawn = [example("drifted", 1, index) for index in range(TRAIN_PICTURES + TEST_PICTURES)]
    keys = [f"{index:016x}{'0' * 48}" for index in range(len(drawn))]
    pixels = torch.from_numpy(to_pixels([picture for picture, _ in drawn]))
    means, spreads = (
        torch.cat(rows) for rows in zip(*(encode_images(parts.vae, part) for part in pixels.split(32)), strict=True)
    )
    text = encode_text(parts, ["", *(caption for _, caption in drawn)])
    rows = slice(0, TRAIN_PICTURES)
    table = Captions(text.states_BLD.numpy(), text.mask_BL.numpy(), np.arange(1, TRAIN_PICTURES + 1))
    data = SplitData(keys[rows], LatentsTable(means[rows].numpy(), spreads[rows].numpy()), table)
    rest = range(TRAIN_PICTURES, len(drawn))
    states = text.rows([index + 1 for index in rest])
    return data, {"means": means[TRAIN_PICTURES:].numpy(), "keys": keys[TRAIN_PICTURES:], "text": states}


def run(data: Any, test: dict[str, Any], seed: int, steps: int) -> np.ndarray:
    """Fine-tune the base's denoiser with one seed; return its loss of every test picture, (N,)."""
    from components.batches import training_batch
    from components.ema import Ema
    from components.freezing import apply_plan, parameter_groups
    from components.models import embedded_base, family_named, load_parts
    from components.objective import make_objective, per_image_losses, squared_error
    from components.optim import make_optimizer, rate_factor
    from components.recipe import LearningRate, TrainSection

    parts = load_parts(embedded_base())
    rates = LearningRate(denoiser=2e-3)
    train = TrainSection(
        steps=steps, global_batch=BATCH, freezing="denoiser", learning_rate=rates, warmup_steps=5, seed=seed
    )
    model = apply_plan(parts, "denoiser", seed)
    optimizer = make_optimizer(model, parameter_groups(model), train)
    peaks = [group["lr"] for group in optimizer.param_groups]
    masters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ema, goal = Ema(masters, train.ema_decay), make_objective(parts.prediction, parts.scheduler)
    family = family_named(parts.family)
    for step in range(steps):
        batch = training_batch(data, goal, train, step, range(BATCH))
        prediction = family.call_denoiser(parts.denoiser, batch.noisy_BCHW, batch.timestep_B, batch.text)
        (squared_error(prediction, batch.target_BCHW) * batch.weight_B).mean().backward()
        torch.nn.utils.clip_grad_norm_(masters, train.clip_norm)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rate_factor(train, step)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(step)

    def text_of(rows: Sequence[int]) -> Any:
        return test["text"].rows(list(rows))

    def predict(latents: torch.Tensor, timesteps: torch.Tensor, text: Any) -> torch.Tensor:
        found: torch.Tensor = family.call_denoiser(parts.denoiser, latents, timesteps, text)
        return found

    parts.denoiser.eval()
    with ema.swapped():
        losses = per_image_losses(goal, predict, test["means"], test["keys"], text_of).mean(axis=1)
    print(f"run {seed}: {steps} steps, loss {losses.mean():.4f}", flush=True)
    return np.asarray(losses)


if __name__ == "__main__":
    main()
