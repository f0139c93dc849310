"""Does a new version do worse on real requests than the one before it? What both did in, keep or roll back out; pure.

Each check asks whether the new version is worse by more than is allowed, and fails only where that is shown: shares of
few requests by Fisher's exact test and Newcombe's limits of a difference (1998, method 10), times by the rank test of
Mann and Whitney with every time at the kinder end of its bucket, means of pictures by Welch's test. All checks of all
looks together spend one significance (Bonferroni), so a version that is no worse is rolled back at most at that rate.
With too few requests nothing is shown either way, and that is said.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from components.bounds import mean_bounds
from components.policy import Check, Outcome

Verdict = Literal["keep", "roll_back", "not_enough_requests"]
ERRORS, TIMES, SAFETY, BLANK, DECAY = "errors", "time_per_step", "safety", "blank_pictures", "decay"
STATISTICS = ("brightness", "contrast", "saturation")
NUM_CHECKS = 5 + len(STATISTICS)
LEAST_REQUESTS = 20
"""Of the new version; fewer without any failed check are no reason to keep it, only none to roll it back.

Times of fewer are not compared: they come in a row, and one hiccup of the machine is in all of them.
"""
LARGEST_SHIFT = 0.25
"""Of the whole range, in the mean of a picture statistic; new data may look different, but not so different."""
LEAST_PICTURES = 10
"""Of each version; the statistics of fewer are not compared."""
BLANK_SHARE = 0.25
"""Of the former contrast; pictures with less are as good as blank."""


@dataclass(frozen=True)
class Numbers:
    """What one version did while it was looked at, of all replicas together."""

    requests: int = 0
    """Drawn or failed; cancelled ones say nothing."""
    errors: int = 0
    """Failed; deadlines that passed too."""
    edges_s: tuple[float, ...] = ()
    """Upper bounds of the buckets of `times`, rising; the last bucket has none."""
    times: tuple[int, ...] = ()
    """Requests by their seconds for each denoising step."""
    row_step_s: float | None = None
    """Mean seconds of the denoiser for one step of one picture, of everything that was drawn meanwhile."""
    pictures: int = 0
    refused: int = 0
    """Pictures that the safety stage kept back."""
    sums: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Of each statistic: its sum over the pictures and the sum of its squares."""


@dataclass(frozen=True)
class Limits:
    """How much worse a version may be before it is rolled back."""

    max_error_share: float
    max_slowdown: float
    significance: float
    """Of all checks and looks together."""
    max_forgetting: float = 0.0
    """Share by which the loss on pictures that arrived since may be higher."""
    looks: int = 1


@dataclass(frozen=True)
class Decay:
    """Losses of both versions on the same pictures (N,), which arrived since the gate decided."""

    former_N: NDArray[np.float64]
    new_N: NDArray[np.float64]


@dataclass(frozen=True)
class Judgement:
    decision: Verdict
    reasons: tuple[str, ...]
    checks: tuple[Check, ...]


def judge(former: Numbers | None, new: Numbers, limits: Limits, decay: Decay | None = None) -> Judgement:
    """Compare the new version with the former one; None where nothing is known of that."""
    level = limits.significance / (NUM_CHECKS * limits.looks)
    checks = (
        check_errors(former, new, limits.max_error_share, level),
        check_times(former, new, limits.max_slowdown, level),
        check_safety(former, new, limits.max_error_share, level),
        check_blank(former, new, level),
        *(check_statistic(name, former, new, level) for name in STATISTICS),
        check_decay(decay, limits.max_forgetting, level),
    )
    failed = [check.sentence for check in checks if check.outcome == "fail"]
    if failed:
        return Judgement("roll_back", tuple(failed), checks)
    if new.requests < LEAST_REQUESTS:
        few = f"{new.requests} requests were drawn by the new version, at least {LEAST_REQUESTS} are needed to judge it"
        return Judgement("not_enough_requests", (few,), checks)
    return Judgement("keep", tuple(check.sentence for check in checks if check.outcome == "pass"), checks)


def check_errors(former: Numbers | None, new: Numbers, allowed: float, level: float) -> Check:
    """Failed requests, as a share, not more than `allowed` above the former version's."""
    known = (former.errors, former.requests) if former is not None and former.requests else None
    return _check_shares(ERRORS, "requests failed", known, (new.errors, new.requests), allowed, level)


def check_safety(former: Numbers | None, new: Numbers, allowed: float, level: float) -> Check:
    """Pictures that the safety stage kept back, as a share of all, likewise."""
    known = (former.refused, former.pictures) if former is not None and former.pictures else None
    return _check_shares(SAFETY, "pictures were refused as unsafe", known, (new.refused, new.pictures), allowed, level)


def check_times(former: Numbers | None, new: Numbers, allowed: float, level: float) -> Check:
    """Seconds a step not longer by more than `allowed`, as a share; slower for each picture too, or it is only load.

    More pictures in a batch make a step longer and a picture's part of it shorter.
    """
    if former is None or min(sum(former.times), sum(new.times)) < LEAST_REQUESTS or former.edges_s != new.edges_s:
        return Check(
            TIMES, "skipped", f"time per step is not compared: not of {LEAST_REQUESTS} requests of each version"
        )
    slower = 1 + allowed
    before, after = _median_s(former), _median_s(new)
    p_value = _p_longer(former, new, slower)
    rows = None if former.row_step_s is None or new.row_step_s is None else (former.row_step_s, new.row_step_s)
    only_load = rows is not None and rows[1] <= slower * rows[0]
    outcome: Outcome = "fail" if p_value <= level and not only_load else "pass"
    told = f"a step takes about {after * 1e3:.3g} ms in {sum(new.times)} requests, {before * 1e3:.3g} ms before"
    sentence = f"{told}: longer by more than {allowed:.0%} (p = {p_value:.1g})" if outcome == "fail" else told
    numbers = {"median_s": after, "former_s": before, "p_value": p_value, "allowed": allowed}
    return Check(TIMES, outcome, sentence, {**numbers, "n": sum(new.times)})


def check_blank(former: Numbers | None, new: Numbers, level: float) -> Check:
    """Contrast not below a quarter of the former: a broken model often draws one colour."""
    if former is None or min(former.pictures, new.pictures) < LEAST_PICTURES:
        return Check(BLANK, "skipped", "contrast is not compared: there are too few pictures")
    ours, theirs = _moments(new, "contrast"), _moments(former, "contrast")
    p_value = _p_above(0.0, ours, (BLANK_SHARE * theirs[0], BLANK_SHARE * theirs[1], theirs[2]))
    told = f"mean contrast is {ours[0]:.3f} in {new.pictures} pictures, {theirs[0]:.3f} before"
    outcome: Outcome = "fail" if p_value <= level else "pass"
    sentence = f"{told}: they are as good as blank (p = {p_value:.1g})" if outcome == "fail" else told
    return Check(BLANK, outcome, sentence, {"mean": ours[0], "former": theirs[0], "p_value": p_value, "n": ours[2]})


def check_statistic(name: str, former: Numbers | None, new: Numbers, level: float) -> Check:
    """The mean of a picture statistic has not moved by more than LARGEST_SHIFT, up or down."""
    if former is None or min(former.pictures, new.pictures) < LEAST_PICTURES:
        return Check(name, "skipped", f"{name} is not compared: there are too few pictures")
    ours, theirs = _moments(new, name), _moments(former, name)
    p_value = min(1.0, 2 * min(_p_above(LARGEST_SHIFT, ours, theirs), _p_above(LARGEST_SHIFT, theirs, ours)))
    told = f"mean {name} is {ours[0]:.3f} in {new.pictures} pictures, {theirs[0]:.3f} before"
    outcome: Outcome = "fail" if p_value <= level else "pass"
    sentence = f"{told}: moved by more than {LARGEST_SHIFT} (p = {p_value:.1g})" if outcome == "fail" else told
    return Check(name, outcome, sentence, {"mean": ours[0], "former": theirs[0], "p_value": p_value, "n": ours[2]})


def check_decay(decay: Decay | None, allowed: float, level: float) -> Check:
    """The loss on pictures that came since the gate decided is not higher by more than `allowed`, as a share."""
    if decay is None or len(decay.new_N) < 2:
        return Check(DECAY, "skipped", "decay is not measured: no pictures came since the gate decided")
    excess = mean_bounds(decay.new_N - (1 + allowed) * decay.former_N, level)
    change = float(decay.new_N.mean() / decay.former_N.mean() - 1)
    told = f"on {excess.n} pictures that came since, the loss is {change:+.1%} of the former version's"
    outcome: Outcome = "fail" if excess.low > 0 else "pass"
    sentence = f"{told}: more than the {allowed:.1%} allowed" if outcome == "fail" else told
    return Check(DECAY, outcome, sentence, {"change": change, "allowed": allowed, "n": excess.n})


def newcombe(ours: tuple[int, int], theirs: tuple[int, int], level: float) -> tuple[float, float]:
    """One-sided limits of the difference of two shares (hits, of), each at `level` (Newcombe 1998, method 10)."""
    (a, la, ua), (b, lb, ub) = _wilson(*ours, level), _wilson(*theirs, level)
    return a - b - math.hypot(a - la, ub - b), a - b + math.hypot(ua - a, b - lb)


def _check_shares(
    name: str, what: str, theirs: tuple[int, int] | None, ours: tuple[int, int], allowed: float, level: float
) -> Check:
    """Fail where the difference is shown to be above `allowed`; where nothing is known before, the share itself."""
    if not ours[1]:
        return Check(name, "skipped", f"nothing is known of how many {what}: there were none at all")
    told = f"{ours[0]} of {ours[1]} {what}"
    numbers: dict[str, float | int | None] = {"hits": ours[0], "n": ours[1], "allowed": allowed}
    if theirs is None:
        p_value = float(stats.binom.sf(ours[0] - 1, ours[1], allowed))
        low, high = (limit - allowed for limit in _wilson(*ours, level)[1:])
        worse, against = p_value <= level, f"more than {allowed:.1%}"
    else:
        table = [[ours[0], ours[1] - ours[0]], [theirs[0], theirs[1] - theirs[0]]]
        p_value = float(stats.fisher_exact(table, alternative="greater").pvalue)
        low, high = newcombe(ours, theirs, level)
        worse, against = p_value <= level and low > allowed, f"more than {allowed:.1%} above that"
        told += f", {theirs[0]} of {theirs[1]} before"
        numbers |= {"former_hits": theirs[0], "former_n": theirs[1]}
    sentence = f"{told}: {against} (p = {p_value:.1g})" if worse else told
    return Check(name, "fail" if worse else "pass", sentence, {**numbers, "low": low, "high": high, "p_value": p_value})


def _wilson(hits: int, of: int, level: float) -> tuple[float, float, float]:
    """A share with Wilson's one-sided limits, each at `level`."""
    z, share = float(special.ndtri(1 - level)), hits / of
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return share, min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))


def _p_longer(former: Numbers, new: Numbers, slower: float) -> float:
    """P-value of "the new version's times are not above `slower` times the former's".

    Times are known by their buckets only: the new ones are taken at the lower end, the former at the upper.
    """
    lower, upper = (0.0, *former.edges_s), (*former.edges_s, math.inf)
    before = np.repeat(np.asarray(upper) * slower, np.asarray(former.times, int))
    after = np.repeat(np.asarray(lower), np.asarray(new.times, int))
    return float(stats.mannwhitneyu(after, before, alternative="greater", method="asymptotic").pvalue)


def _median_s(numbers: Numbers) -> float:
    """Middle of the median's bucket; of the last, which is open, its lower end."""
    place = int(np.searchsorted(np.cumsum(numbers.times), sum(numbers.times) / 2))
    edges: Sequence[float] = (0.0, *numbers.edges_s)
    return edges[place] if place == len(numbers.edges_s) else (edges[place] + edges[place + 1]) / 2


def _moments(numbers: Numbers, name: str) -> tuple[float, float, int]:
    """Mean, standard deviation and number of a statistic."""
    total, squares = numbers.sums.get(name, (0.0, 0.0))
    n = numbers.pictures
    mean = total / n
    return mean, math.sqrt(max(0.0, (squares - n * mean * mean) / (n - 1))), n


def _p_above(margin: float, low: tuple[float, float, int], high: tuple[float, float, int]) -> float:
    """P-value of "the mean of `high` is not more than `margin` above that of `low`" (Welch)."""
    if low[1] == 0 == high[1]:
        return 0.0 if high[0] - low[0] > margin else 1.0
    found: Any = stats.ttest_ind_from_stats(
        high[0] - margin, high[1], high[2], low[0], low[1], low[2], equal_var=False, alternative="greater"
    )
    return float(found.pvalue)
