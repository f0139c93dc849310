"""What a finished search says: a common scale for trials that stopped at different steps, and which choice mattered.

Importance is one-dimensional on purpose (a search has tens of trials, not hundreds): the share of the variance of the
losses' ranks that one key explains alone, by category means or a parabola, less what it explains of shuffled ranks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Curve = Sequence[tuple[int, float]]  # (step, validation loss), by step
OWN = "own"  # origin of the trial that is the config's own recipe
SHUFFLES = 200
MIN_TRIALS = 5  # fewer say nothing about importance


@dataclass(frozen=True)
class Trial:
    """One trial of a search."""

    number: int
    run_id: str
    overrides: Mapping[str, Any]
    state: str
    curve: Curve
    """Empty for a trial that failed at once."""
    reason: str = ""
    origin: str = ""
    """OWN, or who drew it."""

    @property
    def steps(self) -> int:
        return self.curve[-1][0] if self.curve else 0

    @property
    def loss(self) -> float:
        return self.curve[-1][1] if self.curve and self.state != "failed" else math.inf


def common_step(trials: Sequence[Trial]) -> int:
    """Return the last step at which every trial that did not fail was measured."""
    measured = [{step for step, _ in trial.curve} for trial in trials if math.isfinite(trial.loss)]
    return max(set.intersection(*measured), default=0) if measured else 0


def losses_at(trials: Sequence[Trial], step: int) -> np.ndarray:
    """Return the losses at a step (N); infinite where a trial failed or was not measured there."""
    return np.array(
        [dict(trial.curve).get(step, math.inf) if trial.state != "failed" else math.inf for trial in trials]
    )


def at_equal_steps(one: Curve, other: Curve) -> tuple[int, float, float] | None:
    """Return the last step at which both were measured, with both losses; None when there is none."""
    ours, theirs = dict(one), dict(other)
    step = max(ours.keys() & theirs.keys(), default=None)
    return None if step is None else (step, ours[step], theirs[step])


def importance(trials: Sequence[Trial]) -> dict[str, float]:
    """Return for each searched key the share (0 to 1) of the ranks' variance that it explains, largest first.

    A key that only some trials have is judged among those; keys with fewer than MIN_TRIALS trials are left out.
    """
    losses = losses_at(trials, common_step(trials))
    shares = {}
    for path in dict.fromkeys(path for trial in trials for path in trial.overrides):
        rows = [i for i, trial in enumerate(trials) if path in trial.overrides]
        if len(rows) >= MIN_TRIALS:
            ranks = _ranks(losses[rows])
            shares[path] = _explained([trials[i].overrides[path] for i in rows], ranks)
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _ranks(values_N: np.ndarray) -> np.ndarray:
    """Ranks with ties (failed trials) at their mean."""
    order = np.argsort(values_N, kind="stable")
    ranks = np.empty(len(values_N))
    ranks[order] = np.arange(len(values_N))
    for value in np.unique(values_N):
        ranks[values_N == value] = ranks[values_N == value].mean()
    return ranks


def _explained(values: Sequence[Any], ranks_N: np.ndarray) -> float:
    columns_NK = _design(values)
    left, strength, _ = np.linalg.svd(columns_NK - columns_NK.mean(axis=0), full_matrices=False)
    basis = left[:, strength > 1e-9]
    if not basis.shape[1] or ranks_N.std() == 0:
        return 0.0
    generator = np.random.Generator(np.random.Philox(0))
    share = _share(basis, ranks_N)
    chance = np.mean([_share(basis, generator.permutation(ranks_N)) for _ in range(SHUFFLES)])
    return float(np.clip((share - chance) / (1 - chance), 0, 1)) if chance < 1 else 0.0


def _share(basis_NK: np.ndarray, ranks_N: np.ndarray) -> float:
    centred = ranks_N - ranks_N.mean()
    return float(((basis_NK.T @ centred) ** 2).sum() / (centred**2).sum())


def _design(values: Sequence[Any]) -> np.ndarray:
    """Columns that a key's effect may combine: a parabola in (the logarithm of) a number, or one for each category."""
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    distinct = sorted(set(values), key=str)
    if numeric and len(distinct) > 3:
        x = np.array(values, dtype=float)
        if (x > 0).all() and x.max() / x.min() > 10:
            x = np.log(x)
        x = (x - x.mean()) / x.std()
        return np.stack([x, x**2], axis=1)
    return np.array([[float(value == category) for category in distinct] for value in values])
