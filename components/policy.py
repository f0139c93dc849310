"""Should a candidate replace the champion? The gate: evidence in, verdict with reasons out; no side effects, no clock.

Ordered checks, each pass, fail, inconclusive or skipped, with its numbers. One failure rejects; else one inconclusive
check holds; else the candidate is promoted. Every check has to pass, so the chance of promoting an equal model is at
most that of the improvement check alone (Berger 1982, intersection-union).

Improvement. Two runs of one recipe with other seeds differ in their weights, hence in their true losses, and enough
pictures would find that difference. So the limit holds, besides the pictures' error, what a pair of seeds differs by:
sqrt(2) * seed_spread. The other checks ask about these weights, which are what gets served, and have no such part.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from scipy import special

from components.bounds import Bounds, items_to_decide, mean_bounds, smallest_effect
from components.evidence import Champion, Evidence, Losses, NewData, Scores, Served
from components.metrics import Estimate
from components.recipe import GateSection

Outcome = Literal["pass", "fail", "inconclusive", "skipped"]
Verdict = Literal["promote", "hold", "reject"]
DATA, SERVING, CHAMPION = "data", "serving", "champion"
FORGETTING, IMPROVEMENT, CLIP, ANCHORS, COVERAGE = "forgetting", "improvement", "clip_score", "anchors", "coverage"
CANARY = "canary"
"""Added by `with_check` where a candidate that passed the rest was tried on traffic."""
LARGEST_PIXEL_DIFFERENCE = 1
"""Of 255. Served and sampled alone in one thread or several, values move by about 1e-6, which can turn one rounding."""


@dataclass(frozen=True)
class Check:
    name: str
    outcome: Outcome
    sentence: str
    numbers: dict[str, float | int | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    verdict: Verdict
    reasons: tuple[str, ...]
    checks: tuple[Check, ...]


def decide(evidence: Evidence, gate: GateSection) -> Decision:
    """Run the checks in order; what needs a champion is skipped where there is none, or none that loads."""
    data = check_data(evidence.data, gate)
    if evidence.champion is None and data.outcome != "pass":  # nothing is compared, so nothing is open
        data = replace(data, outcome="skipped")
    checks = [data, check_served(evidence.served, gate), check_champion(evidence.champion)]
    comparable = evidence.champion is not None and checks[-1].outcome == "pass"
    if comparable and checks[1].outcome == "pass":
        checks += [
            check_forgetting(evidence, gate),
            check_improvement(evidence.new, gate),
            check_scores(CLIP, "CLIP score on the new prompts", evidence.prompts, gate.max_clip_drop, gate),
            check_scores(ANCHORS, "CLIP score on the anchor prompts", evidence.anchors, gate.max_clip_drop, gate),
            check_coverage(evidence.coverage, gate),
        ]
    return Decision(_verdict(checks), _reasons(checks), tuple(checks))


def with_check(decision: Decision, check: Check) -> Decision:
    """Return the decision as it is with one more check."""
    checks = [*decision.checks, check]
    return Decision(_verdict(checks), _reasons(checks), tuple(checks))


def _verdict(checks: list[Check]) -> Verdict:
    outcomes = {check.outcome for check in checks}
    return "reject" if "fail" in outcomes else "hold" if "inconclusive" in outcomes else "promote"


def _reasons(checks: list[Check]) -> tuple[str, ...]:
    """What decided comes first: failures, then what is open, then the rest."""
    order: tuple[Outcome, ...] = ("fail", "inconclusive", "pass", "skipped")
    return tuple(check.sentence for outcome in order for check in checks if check.outcome == outcome)


def check_data(data: NewData, gate: GateSection) -> Check:
    """Enough test pictures that neither model was trained on."""
    numbers: dict[str, float | int | None] = {"pictures": data.pictures, "seen": data.seen}
    if data.seen:
        sentence = (
            f"{data.seen} of {data.pictures} test pictures of {data.dataset} were trained on: losses on them flatter"
        )
        return Check(DATA, "inconclusive", f"{sentence}; prepare with the fractions of the older data", numbers)
    if data.pictures < gate.min_test_pictures:
        sentence = f"{data.dataset} has {data.pictures} test pictures, at least {gate.min_test_pictures} are needed"
        return Check(DATA, "inconclusive", f"{sentence}: {gate.min_test_pictures - data.pictures} more", numbers)
    return Check(DATA, "pass", f"{data.dataset} has {data.pictures} test pictures that no model trained on", numbers)


def check_served(served: Served, gate: GateSection) -> Check:
    """It loads and answers within its time, and what it serves is what the sampler draws."""
    numbers: dict[str, float | int | None] = {
        "ready_s": served.ready_s,
        "answer_s": served.answer_s,
        "time_budget_s": gate.time_budget_s,
        "pictures": served.pictures,
        "largest_difference": served.largest_difference,
        "memory_bytes": served.memory_bytes,
    }
    if served.problem:
        return Check(SERVING, "fail", f"it does not serve: {served.problem}", numbers)
    told = f"{served.pictures} pictures in {served.answer_s:.1f} s (at most {gate.time_budget_s:g} s)"
    if served.answer_s > gate.time_budget_s:
        return Check(SERVING, "fail", f"it serves too slowly: {told}", numbers)
    if served.largest_difference > LARGEST_PIXEL_DIFFERENCE:
        sentence = f"served pictures are not the sampler's: they differ by {served.largest_difference} of 255"
        return Check(SERVING, "fail", sentence, numbers)
    memory = f"{served.memory_bytes / 2**20:.0f} MiB"
    return Check(SERVING, "pass", f"it serves the sampler's pictures: {told}, {memory} in its replica", numbers)


def check_champion(champion: Champion | None) -> Check:
    """Whether there is something to compare with."""
    if champion is None:
        return Check(
            CHAMPION, "skipped", "there was no champion before: the first model needs only to be sound and serve"
        )
    if champion.problem:
        sentence = f"champion {champion.version} cannot be loaded, so nothing shows that the candidate is better"
        ways = "restore it, go back with `fresco rollback`, or promote with --force"
        return Check(CHAMPION, "inconclusive", f"{sentence} ({champion.problem}); {ways}")
    if champion.same_weights:
        return Check(CHAMPION, "fail", f"the candidate has the weights of champion {champion.version}: nothing to gain")
    return Check(CHAMPION, "pass", f"compared with champion {champion.version}, item by item")


def check_forgetting(evidence: Evidence, gate: GateSection) -> Check:
    """On the champion's own test pictures the loss is not higher by more than `max_forgetting`."""
    if evidence.own is None:
        known = evidence.champion is not None and evidence.champion.dataset is not None
        same = "the champion's own data is the new data: the improvement check speaks for both"
        note = same if known else "nothing says what data the champion was trained on: forgetting cannot be measured"
        return Check(FORGETTING, "skipped", note)
    own = evidence.own
    if own.candidate_N is None or own.champion_N is None:
        return Check(FORGETTING, "inconclusive", f"forgetting cannot be measured: {own.missing}")
    level = float(own.champion_N.mean())
    excess = mean_bounds(own.candidate_N - (1 + gate.max_forgetting) * own.champion_N, gate.significance)
    change, outcome = _relative(excess, level, gate.max_forgetting), _outcome(excess)
    needed = _needed(excess, outcome, gate)
    worst, limit = f"{change['high']:+.1%} with {1 - gate.significance:.0%} confidence", f"{gate.max_forgetting:.1%}"
    told = f"on the champion's own data ({own.dataset}) the loss changes by {change['change']:+.1%}"
    sentences = {
        "pass": f"{told} (at most {worst}; allowed {limit})",
        "fail": f"{told} (at least {change['low']:+.1%}): it forgets more than the {limit} allowed",
        "inconclusive": f"{told} (up to {worst}; allowed {limit}): {_advice(needed, excess.n)}",
    }
    return Check(FORGETTING, outcome, sentences[outcome], {**change, "allowed": gate.max_forgetting, "needed": needed})


def check_improvement(losses: Losses | None, gate: GateSection) -> Check:
    """On the new test pictures the loss is lower by more than `min_improvement` and than what seeds change."""
    if losses is None or losses.candidate_N is None or losses.champion_N is None:
        missing = losses.missing if losses else "there are no losses"
        return Check(IMPROVEMENT, "inconclusive", f"improvement cannot be measured: {missing}")
    level = float(losses.champion_N.mean())
    seeds = seed_width(level, gate)
    excess = mean_bounds(losses.candidate_N - (1 - gate.min_improvement) * losses.champion_N, gate.significance, seeds)
    change, outcome = _relative(excess, level, -gate.min_improvement), _outcome(excess)
    if excess.high == 0:  # equal losses and no margins: not worse is not better
        outcome = "fail"
    needed = _needed(excess, outcome, gate, seeds)
    found = smallest_effect(excess.deviation, excess.n, gate.significance, gate.power, seeds) / level
    wanted = f"more than {gate.min_improvement:.1%} lower"
    told = f"on the new data ({losses.dataset}) the loss changes by {change['change']:+.1%}"
    between = f"between {change['low']:+.1%} and {change['high']:+.1%}"
    sure = f"{1 - gate.significance:.0%} confidence, pictures and seeds"
    sentences = {
        "pass": f"{told} (at most {change['high']:+.1%} with {sure}; wanted {wanted}), {excess.n} pictures",
        "fail": f"{told} (at best {change['low']:+.1%} with {sure}): shown not to be {wanted}",
        "inconclusive": f"{told} ({between}; wanted {wanted}): {_advice(needed, excess.n)}",
    }
    numbers = {**change, "wanted": gate.min_improvement, "needed": needed, "detectable": gate.min_improvement + found}
    return Check(IMPROVEMENT, outcome, sentences[outcome], numbers)


def seed_width(champion_loss: float, gate: GateSection) -> float:
    """By how much two equal recipes' losses differ at most, by seed alone, at the gate's significance."""
    return float(special.ndtri(1 - gate.significance)) * math.sqrt(2) * gate.seed_spread * champion_loss


def check_scores(name: str, what: str, scores: Scores | None, allowed: float, gate: GateSection) -> Check:
    """Scores by prompt (higher is better) are not lower by more than `allowed` points."""
    if scores is None:
        return Check(name, "skipped", f"the {what} is not compared: there are no prompts for it")
    if scores.encoders[0] != scores.encoders[1]:
        return _other_encoders(name, what, scores)
    change = mean_bounds(scores.candidate - scores.champion + allowed, gate.significance)  # type: ignore[operator]
    outcome = _outcome(change, higher_is_better=True)
    needed = _needed(change, outcome, gate)
    low, middle, high = (value - allowed for value in (change.low, change.mean, change.high))
    told = (
        f"the {what} changes by {middle:+.2f} ({low:+.2f} to {high:+.2f}, {change.n} prompts; allowed {-allowed:+.2f})"
    )
    ends = {"pass": "", "fail": ": it is worse", "inconclusive": f": {_advice(needed, change.n, 'prompts')}"}
    numbers = {"change": middle, "low": low, "high": high, "n": change.n, "allowed": allowed, "needed": needed}
    return Check(name, outcome, told + ends[outcome], numbers)


def check_coverage(scores: Scores | None, gate: GateSection) -> Check:
    """The share of test pictures that drawn ones come close to has not collapsed; two intervals, not paired."""
    if scores is None or not isinstance(scores.candidate, Estimate) or not isinstance(scores.champion, Estimate):
        return Check(COVERAGE, "skipped", "coverage is not compared: it was not measured of both models")
    if scores.encoders[0] != scores.encoders[1]:
        return _other_encoders(COVERAGE, "coverage", scores)
    ours, theirs = scores.candidate, scores.champion
    middle = ours.value - theirs.value
    low = middle - math.hypot(ours.value - ours.low, theirs.high - theirs.value)
    high = middle + math.hypot(ours.high - ours.value, theirs.value - theirs.low)
    # A collapse must show: coverage rests on few pictures, and a limit that has to clear would hold everything.
    outcome: Outcome = "fail" if high < -gate.max_coverage_drop else "pass"
    told = (
        f"coverage changes by {middle:+.2f} ({low:+.2f} to {high:+.2f}; a fall by {gate.max_coverage_drop:.2f} rejects)"
    )
    numbers: dict[str, float | int | None] = {"change": middle, "low": low, "high": high, "n": ours.n}
    numbers["allowed"] = gate.max_coverage_drop
    return Check(COVERAGE, outcome, told + (": it collapsed" if outcome == "fail" else ""), numbers)


def _other_encoders(name: str, what: str, scores: Scores) -> Check:
    ours, theirs = scores.encoders
    sentence = f"{what}: measured with encoder {ours} here and {theirs} for the champion, which do not compare"
    return Check(name, "inconclusive", f"{sentence}; measure both with one (model.clip)")


def _outcome(bounds: Bounds, higher_is_better: bool = False) -> Outcome:
    """Which side of zero the mean is shown to be on; a mean and limits of exactly zero pass."""
    good, bad = (bounds.low >= 0, bounds.high < 0) if higher_is_better else (bounds.high <= 0, bounds.low > 0)
    return "pass" if good else "fail" if bad else "inconclusive"


def _relative(excess: Bounds, level: float, margin: float) -> dict[str, float | int | None]:
    """From the excess over a margin to the change itself, as shares of the champion's loss."""
    change, low, high = (value / level + margin for value in (excess.mean, excess.low, excess.high))
    return {"change": change, "low": low, "high": high, "n": excess.n}


def _needed(bounds: Bounds, outcome: Outcome, gate: GateSection, extra_width: float = 0.0) -> int | None:
    """Items that would settle an open question, if the mean stays; None where it is settled or cannot be."""
    if outcome != "inconclusive":
        return None
    return items_to_decide(bounds.mean, bounds.deviation, gate.significance, gate.power, extra_width)


def _advice(needed: int | None, n: int, items: str = "test pictures") -> str:
    if needed is None:
        return (
            f"no number of {items} would decide: it is as close to the limit as another seed of one recipe may move it"
        )
    return f"about {max(1, needed - n)} more {items} would decide, if the difference stays"
