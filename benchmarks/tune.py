"""Does the search find a good recipe with fewer steps, and what does a trial cost beside its steps? `make bench-tune`.

The problem is real and small: the embedded base learns the drifted emblems, for so few steps that the recipe matters.
For each seed, two searches with the same seed, space and number of trials, on one worker with the plain engine:

    random      random draws, every trial runs to its full length
    TPE + ASHA  `fresco tune` as it is: the same first draws, then TPE; successive halving

The first number is the share of random search's steps after which TPE + ASHA has a full-length validation loss at most
random search's best (more than 1: it never got there within its budget, the same total of steps). The second is the
time from a trial's last evaluation to the next trial's first step, in warm groups, beside starting a group for each.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cluster.session import local_session
from cluster.workers import read_lines
from flows import train, tune
from flows.config import Config, load_config

SEEDS = (0, 1, 2)
TRIALS, MORE_TRIALS, STEPS, EVERY = 10, 40, 54, 6
SPACE = {
    "train.freezing": {"choice": ["denoiser", "denoiser_attention", "all", "lora:8"]},
    "train.learning_rate.denoiser": {"loguniform": [1e-5, 1e-1]},
    "train.learning_rate.text_encoder": {"loguniform": [1e-5, 1e-1]},
    "train.caption_dropout": {"uniform": [0.0, 0.5]},
}


def main() -> None:
    """Run both searches for every seed in one workspace's data, print the tables."""
    with tempfile.TemporaryDirectory(prefix="fresco-bench-") as folder:
        config = make_config(Path(folder), "random", 0)
        with local_session(config.placement):
            rows = [compare(Path(folder), seed) for seed in SEEDS]
            cold = cold_gaps(Path(folder))
    show(rows, cold)


def make_config(folder: Path, sampler: str, seed: int) -> Config:
    smart = sampler != "random"
    values: dict[str, Any] = {
        "data.source": "emblems://drifted?count=600&seed=1",
        "train.steps": STEPS,
        "train.global_batch": 16,
        "train.warmup_steps": 4,
        "train.ema_decay": 0.9,
        "train.eval_every_steps": EVERY,
        "train.eval_images": 48,
        "train.seed": seed,
        "evaluate.sampling_steps": 4,
        "placement.workers": 1,
        "placement.engine": "torch",
        "placement.checkpoint_every_steps": 1000,
        "search.space": SPACE,
        "search.seed": seed,
        "search.sampler": sampler,
        "search.scheduler": "asha" if smart else "none",
        "search.trials": MORE_TRIALS if smart else TRIALS,
        "search.budget_steps": TRIALS * STEPS,
        "search.grace_steps": EVERY,
        "search.own_recipe": False,
        "search.warm_start": False,
        "search.concurrent": 1,
    }
    overrides = [f"{path}={json.dumps(value)}" for path, value in values.items()]
    return load_config(overrides=overrides, workspace=str(folder / "workspace"))


def compare(folder: Path, seed: int) -> dict[str, Any]:
    """Return both searches' courses: after how many steps which full-length loss was known."""
    row: dict[str, Any] = {"seed": seed}
    for sampler in ("random", "tpe"):
        # Each search computes all its trials: a run that the other one made would be found complete.
        config = make_config(folder, sampler, seed).model_copy(update={"name": f"{sampler}{seed}"})
        began = time.monotonic()
        results = tune.run(config)
        row[sampler] = {
            "course": course(results),
            "trials": len(results["trials"]),
            "steps": sum(trial["steps"] for trial in results["trials"]),
            "seconds": time.monotonic() - began,
            "gaps": results["seconds_between_trials"],
            "step_s": step_seconds(Path(config.workspace), results),
        }
    goal = row["random"]["course"][-1][1]
    reached = [steps for steps, loss in row["tpe"]["course"] if loss <= goal]
    row["share"] = reached[0] / row["random"]["steps"] if reached else float("inf")
    row["goal"] = goal
    return row


def course(results: dict[str, Any]) -> list[tuple[int, float]]:
    """(steps spent, best full-length loss known), from the order in which trials ran."""
    spent, best, found = 0, float("inf"), []
    winner = results["best"]
    for trial in results["trials"]:
        # A winner that had been stopped was continued after all others.
        own = winner["continued_from"] if trial["run_id"] == winner["run_id"] else trial["steps"]
        spent += own
        if own == STEPS and trial["eval_loss"] is not None:
            best = min(best, trial["eval_loss"])
            found.append((spent, best))
    if winner["continued_from"] < STEPS:
        found.append((spent + STEPS - winner["continued_from"], min(best, winner["eval_loss"])))
    return found


def step_seconds(workspace: Path, results: dict[str, Any]) -> float:
    """Median seconds that a full-length trial spent between its first and its last evaluation."""
    times = []
    for trial in results["trials"]:
        lines = read_lines(workspace / "runs" / trial["run_id"] / "metrics.jsonl")
        seen = [line["time_s"] for line in lines if "eval/loss" in line]
        if trial["steps"] == STEPS:
            times.append(seen[-1] - seen[0])
    return statistics.median(times)


def cold_gaps(folder: Path) -> list[float]:
    """Seconds from the call of `train` to its first step, a fresh worker group for each of three runs."""
    found = []
    for seed in range(100, 103):
        config = make_config(folder, "random", seed)
        short = config.model_copy(update={"train": config.train.model_copy(update={"steps": 1})})
        began = time.time()
        result = train.run(short)
        lines = read_lines(Path(config.workspace) / "runs" / result["run_id"] / "metrics.jsonl")
        found.append(next(line["time_s"] for line in lines if "eval/loss" in line) - began)
    return found[1:]  # the first also prepared the data


def show(rows: list[dict[str, Any]], cold: list[float]) -> None:
    """Print the tables as Markdown."""
    print(f"\n{TRIALS} trials of {STEPS} steps at random; TPE + ASHA with the same {TRIALS * STEPS} steps at most\n")
    print("| seed | random: best loss | TPE + ASHA: best loss (trials) | steps to random's best, share |")
    print("|---|---|---|---|")
    for row in rows:
        best = min(loss for _, loss in row["tpe"]["course"])
        print(f"| {row['seed']} | {row['goal']:.5f} | {best:.5f} ({row['tpe']['trials']}) | {row['share']:.2f} |")
    shares = [row["share"] for row in rows]
    print(f"\nmedian share: {statistics.median(shares):.2f}")
    gaps = [gap for row in rows for name in ("random", "tpe") for gap in row[name]["gaps"]]
    steps = statistics.median(row["random"]["step_s"] for row in rows)
    print("\n| from a trial's last evaluation to the next one's first step | seconds (median, max) |\n|---|---|")
    print(f"| a worker group for each run | {statistics.median(cold):.1f}, {max(cold):.1f} |")
    print(f"| warm worker groups | {statistics.median(gaps):.1f}, {max(gaps):.1f} |")
    print(f"\n{STEPS} steps with their evaluations take {steps:.1f} s (median)")
    if statistics.median(shares) > 0.5:
        sys.exit("TPE + ASHA needed more than half of random search's steps")


if __name__ == "__main__":
    main()
