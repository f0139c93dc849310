"""How well can a classifier tell arrivals from the reference? An effect size in [0.5, 1] that people can read.

A ridge-penalised logistic regression is fitted on four fifths and ranks the last fifth, five times. The AUROC is the
mean of the folds' AUROCs (scores of two folds have no common scale: pooled, equal samples come out below 0.5), with the
influence-curve interval of LeDell, Petersen & van der Laan (2015, doi:10.1214/15-EJS1035), whose parts in a fold are
DeLong's (1988). Near duplicates share a fold: a classifier that has seen the twin of a test item recognises it and
calls that drift. The interval is of these fitted classifiers; a significance test is `two_sample`.
Shape letters: N items, D feature width.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from components.errors import InputError
from components.metrics import Estimate

Array = NDArray[np.float64]

FOLDS = 5
FEWEST_A_FOLD = 4
"""Items of each side in a fold, below which a fold's AUROC has no interval."""
NEWTON_STEPS = 25


def domain_auroc(
    reference_ND: Any, arrivals_MD: Any, groups_N: Any, seed: int, confidence: float = 0.95
) -> Estimate | None:
    """AUROC with its interval; None where items, or groups of near duplicates, are too few for the folds.

    `groups_N` are group numbers over reference and arrivals, in this order (`near_duplicates.duplicate_groups`).
    """
    reference, arrivals = np.asarray(reference_ND, np.float64), np.asarray(arrivals_MD, np.float64)
    rows_ND, side_N = np.concatenate([reference, arrivals]), np.repeat([0.0, 1.0], [len(reference), len(arrivals)])
    groups = np.asarray(groups_N)
    if groups.shape != side_N.shape:
        raise InputError(f"expected a group for each of {len(side_N)} items, found shape {groups.shape}")
    folds = assign_folds(groups, side_N, seed)
    sizes = [np.bincount(folds[side_N == side], minlength=FOLDS).min() for side in (0, 1)]
    if min(sizes) < FEWEST_A_FOLD:
        return None
    aurocs, variances = [], []
    for fold in range(FOLDS):
        test = folds == fold
        scores = fit_logistic(rows_ND[~test], side_N[~test])(rows_ND[test])
        value, variance = auroc_and_variance(scores[side_N[test] == 0], scores[side_N[test] == 1])
        aurocs.append(value)
        variances.append(variance)
    return _estimate(float(np.mean(aurocs)), sum(variances) / FOLDS**2, len(side_N), confidence)


def score_auroc(reference_N: Any, arrivals_M: Any, confidence: float = 0.95) -> Estimate:
    """The same of one number an item: the chance that an arrival's is higher, ties half."""
    reference, arrivals = np.asarray(reference_N, np.float64), np.asarray(arrivals_M, np.float64)
    if min(len(reference), len(arrivals)) < FEWEST_A_FOLD:
        raise InputError(
            f"an AUROC expects {FEWEST_A_FOLD} items a side, found {len(reference)} and {len(arrivals)}; wait for more"
        )
    value, variance = auroc_and_variance(reference, arrivals)
    return _estimate(value, variance, len(reference) + len(arrivals), confidence)


def auroc_and_variance(lower: Array, higher: Array) -> tuple[float, float]:
    """Chance that one of `higher` exceeds one of `lower`, ties half, and its variance after DeLong (1988)."""
    wins_higher, wins_lower = _share_below(lower, higher), 1 - _share_below(higher, lower)
    variance = wins_higher.var(ddof=1) / len(higher) + wins_lower.var(ddof=1) / len(lower)
    return float(wins_higher.mean()), float(variance)


def _share_below(values: Array, at: Array) -> Array:
    ordered = np.sort(values)
    return np.asarray(
        (np.searchsorted(ordered, at, "left") + np.searchsorted(ordered, at, "right")) / (2 * len(values))
    )


def _estimate(value: float, variance: float, n: int, confidence: float) -> Estimate:
    """On the logit scale, so that the ends stay inside (0, 1); a perfect separation is a half item short of it."""
    inner = min(max(value, 1 / (2 * n)), 1 - 1 / (2 * n))
    deviation = max(math.sqrt(variance), 1 / (2 * n))
    half = float(stats.norm.ppf((1 + confidence) / 2)) * deviation / (inner * (1 - inner))
    ends = special.expit([special.logit(inner) - half, special.logit(inner) + half])
    return Estimate(value, float(min(ends[0], value)), float(max(ends[1], value)), n)


def assign_folds(groups_N: NDArray[Any], side_N: Array, seed: int) -> NDArray[np.int64]:
    """A fold for each item, (N,): groups stay together, both sides are spread evenly, the largest groups first."""
    generator = np.random.default_rng((seed, 31))
    names, place = np.unique(groups_N, return_inverse=True)
    sizes = np.stack([np.bincount(place, side_N == side, len(names)) for side in (0, 1)], axis=1)
    totals = np.maximum(sizes.sum(axis=0), 1)
    filled, fold_of = np.zeros((FOLDS, 2)), np.zeros(len(names), np.int64)
    shuffled = generator.permutation(len(names))
    for group in shuffled[np.argsort(-sizes[shuffled].sum(axis=1), kind="stable")]:
        after = ((filled + sizes[group]) / totals) ** 2 - (filled / totals) ** 2
        fold_of[group] = int(after.sum(axis=1).argmin())
        filled[fold_of[group]] += sizes[group]
    return np.asarray(fold_of[place])


def fit_logistic(rows_ND: Array, side_N: Array) -> Any:
    """Fit by Newton's method on standardised features and return rows -> scores (N,).

    The penalty D / 2 |w|^2 is a prior under which scores have unit variance whatever the feature width.
    """
    mean, spread = rows_ND.mean(axis=0), rows_ND.std(axis=0)
    kept = spread > 1e-9 * (spread.max() or 1)
    spread = np.where(kept, spread, 1)
    inputs = np.c_[np.where(kept, (rows_ND - mean) / spread, 0), np.ones(len(rows_ND))]
    penalty = np.append(np.full(rows_ND.shape[1], float(max(1, kept.sum()))), 1e-6)
    weights = np.zeros(inputs.shape[1])
    for _ in range(NEWTON_STEPS):
        chance = special.expit(inputs @ weights)
        slope = inputs.T @ (chance - side_N) + penalty * weights
        curvature = (inputs * (chance * (1 - chance))[:, None]).T @ inputs + np.diag(penalty)
        step = np.linalg.solve(curvature, slope)
        weights = weights - step
        if np.abs(step).max() < 1e-6:
            break

    def scores(rows: Array) -> Array:
        return np.asarray(np.where(kept, (rows - mean) / spread, 0) @ weights[:-1] + weights[-1])

    return scores
