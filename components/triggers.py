"""Shall we train again now? Evidence and the config in, `retrain` or `wait` out, with every reason and its numbers.

Each trigger (schedule, number of new pictures, drift, decay, by hand, no champion yet) speaks for itself; all that
speak are kept. Then whatever holds a retraining back: nothing new to learn from, data that a refused attempt had
already, too little that the gate could judge by, the cool-down, the budget. A `wait` says as much as a `retrain`. Pure:
no clock, no file is read here.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from components import schedule
from components.arrivals import CHANGING_REASONS, words
from components.enough import Enough
from components.standing import RetrainSection

RETRAIN, WAIT = "retrain", "wait"
DRIFTED = "drift"
FIRST, SCHEDULE, NEW_IMAGES, DRIFT, DECAY, MANUAL = "first_start", "schedule", "new_images", "drift", "decay", "manual"
NOTHING_NEW, REFUSED, TOO_FEW, COOLDOWN = "nothing_new", "refused_before", "too_few_pictures", "cooldown"
BUDGET_STEPS, BUDGET_GPU, SOURCE = "budget_steps", "budget_gpu_hours", "source"
CHANGING, PENDING, MISSING = "changing", "pending", "missing"
"""What is worth knowing of the source, whatever is decided."""
WEEK_S = 7 * 86400.0
MOST_REASONS = 3
"""Of the monitor's in ours."""
ENOUGH_FRESH = 0.1
"""Of the pictures of a refused attempt: so many others make it another attempt."""


@dataclass(frozen=True)
class Reason:
    """One thing that speaks for or against, in words and in numbers."""

    kind: str
    text: str
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Drift:
    """What the monitor said."""

    verdict: str
    effect: float = 0.0
    """0 to 1, of the stream that drifted most."""
    reasons: tuple[str, ...] = ()
    report: str = ""


@dataclass(frozen=True)
class Decay:
    """The champion's mean loss on its own test pictures and on arrivals; `skipped` says why it was not measured."""

    own: float = 0.0
    arrivals: float = 0.0
    low: float = 0.0
    """Lower end of the 95 % interval of arrivals / own - 1."""
    pictures: int = 0
    skipped: str = ""


@dataclass(frozen=True)
class Evidence:
    """What is known when the loop looks; times are Unix seconds."""

    now: float
    champion: int | None
    new_images: int = 0
    """Arrivals that the champion's dataset lacks."""
    refused_images: int = 0
    """Of those, the ones that an attempt had which was refused or rolled back."""
    refused_first: str = ""
    """Which cycle made a first model of the same pictures by the same recipe, and why it was refused; empty: none."""
    enough: Enough | None = None
    """Whether the gate could judge what is trained on them; None: nothing is compared, or nobody looked."""
    pending: dict[str, int] = field(default_factory=dict)
    """Files at the source that are no arrivals yet, by reason."""
    missing: int = 0
    """Files of the champion's data that the source has no more."""
    last_tick: float = 0.0
    """Up to when the schedule's ticks were heeded."""
    last_ended: float | None = None
    drift: Drift | None = None
    """None: the monitor was not asked."""
    decay: Decay | None = None
    manual: str = ""
    """Who asked by hand; empty: nobody."""
    planned_steps: int = 0
    planned_gpu_hours: float = 0.0
    spent_steps: int = 0
    """In the last 7 days, as are the hours."""
    spent_gpu_hours: float = 0.0
    problem: str = ""
    """Why the source could not be read; empty: it was."""

    @property
    def fresh_images(self) -> int:
        return self.new_images - self.refused_images


@dataclass(frozen=True)
class Decision:
    """What to do, why, and what spoke against it."""

    verdict: str
    triggers: tuple[Reason, ...]
    held_by: tuple[Reason, ...]
    quiet: tuple[Reason, ...]
    """Triggers that could have spoken and did not, with how far they are from it."""
    heed_tick: bool = False
    """The schedule's ticks so far are dealt with; otherwise they stay due."""
    notes: tuple[Reason, ...] = ()
    """What the source has that cannot be used yet, and what it has lost."""

    @property
    def reasons(self) -> list[str]:
        """For people: why we train, or "no, because"; then what is to be known of the source."""
        notes = [reason.text for reason in self.notes]
        if self.verdict == RETRAIN:
            return [*(reason.text for reason in self.triggers), *notes]
        silent = ["no trigger: " + "; ".join(reason.text for reason in self.quiet)] if not self.triggers else []
        wanted = [f"asked for: {reason.text}" for reason in self.triggers]
        return [*(f"no, because {reason.text}" for reason in self.held_by), *wanted, *silent, *notes]

    @property
    def numbers(self) -> dict[str, Any]:
        """Every reason's numbers, by kind."""
        return {reason.kind: reason.numbers for reason in (*self.triggers, *self.held_by, *self.quiet, *self.notes)}

    @property
    def kinds(self) -> list[str]:
        """What tells one wait from another, whatever the numbers; what passes by itself does not."""
        spoken = (*self.triggers, *self.held_by, *self.notes)
        return [self.verdict, *sorted(reason.kind for reason in spoken if reason.kind != CHANGING)]


def decide(evidence: Evidence, section: RetrainSection) -> Decision:
    """Merge the triggers, then ask what holds them back."""
    spoken: list[Reason] = []
    quiet: list[Reason] = []
    for speaks, reason in _triggers(evidence, section):
        (spoken if speaks else quiet).append(reason)
    held = _holds(evidence, section, {reason.kind for reason in spoken})
    verdict = RETRAIN if spoken and not held else WAIT
    useless = {NOTHING_NEW, REFUSED, TOO_FEW} & {reason.kind for reason in held}
    heed_tick = verdict == RETRAIN or bool(useless)  # cool-down and budget keep a tick due
    return Decision(verdict, tuple(spoken), tuple(held), tuple(quiet), heed_tick, _notes(evidence))


def _notes(evidence: Evidence) -> tuple[Reason, ...]:
    """What of the source is no arrival and why, and what it has lost."""
    changing = {reason: count for reason, count in evidence.pending.items() if reason in CHANGING_REASONS}
    waiting = {reason: count for reason, count in evidence.pending.items() if reason not in CHANGING_REASONS}
    notes = [Reason(kind, words(some), some) for kind, some in ((PENDING, waiting), (CHANGING, changing)) if some]
    if evidence.missing:
        text = f"{evidence.missing} files of the champion's data are gone from the source or were replaced"
        notes.append(Reason(MISSING, f"{text}; its dataset version keeps them", {"files": evidence.missing}))
    return tuple(notes)


def _triggers(evidence: Evidence, section: RetrainSection) -> list[tuple[bool, Reason]]:
    """Every trigger that is on: whether it speaks, and its words and numbers."""
    found = []
    if evidence.champion is None:
        found.append((True, Reason(FIRST, "there is no champion yet")))
    if evidence.manual:
        found.append((True, Reason(MANUAL, f"asked for by hand ({evidence.manual})")))
    if section.schedule:
        found.append(_schedule(evidence, section))
    if section.min_new_images and evidence.champion is not None:
        found.append(_amount(evidence, section.min_new_images))
    if section.on_drift and evidence.champion is not None:
        found.append(_drift(evidence.drift))
    if section.max_decay and evidence.champion is not None:
        found.append(_decay(evidence.decay, section.max_decay))
    return found


def _schedule(evidence: Evidence, section: RetrainSection) -> tuple[bool, Reason]:
    zone = section.time_zone
    due = schedule.due(section.schedule, zone, evidence.last_tick, evidence.now)
    if due is None:
        after = schedule.following(section.schedule, zone, max(evidence.now, evidence.last_tick))
        when = schedule.written(after, zone) if after is not None else "never"
        return False, Reason(SCHEDULE, f"the next tick of {section.schedule!r} is {when}", {"next": after})
    missed = f", {due.count} ticks taken as one" if due.count > 1 else ""
    text = f"the schedule {section.schedule!r} ticked at {schedule.written(due.first, zone)}{missed}"
    return True, Reason(SCHEDULE, text, {"tick": due.first, "ticks": due.count})


def _amount(evidence: Evidence, least: int) -> tuple[bool, Reason]:
    fresh = evidence.fresh_images
    before = f" ({evidence.refused_images} more were in a refused attempt)" if evidence.refused_images else ""
    text = f"{fresh} new pictures{before}, {least} are enough"
    return fresh >= least, Reason(NEW_IMAGES, text, {"new": fresh, "refused": evidence.refused_images, "least": least})


def _drift(drift: Drift | None) -> tuple[bool, Reason]:
    if drift is None:
        return False, Reason(DRIFT, "the monitor was not asked")
    more = f"; {len(drift.reasons) - MOST_REASONS} more in its report" if len(drift.reasons) > MOST_REASONS else ""
    told = f": {'; '.join(drift.reasons[:MOST_REASONS])}{more}" if drift.reasons else ""
    return drift.verdict == DRIFTED, Reason(
        DRIFT,
        f"the monitor says {drift.verdict}{told}",
        {"verdict": drift.verdict, "effect": drift.effect, "report": drift.report},
    )


def _decay(decay: Decay | None, most: float) -> tuple[bool, Reason]:
    if decay is None or decay.skipped:
        why = decay.skipped if decay else "nobody looked"
        return False, Reason(DECAY, f"decay was not measured: {why}")
    share = decay.arrivals / decay.own - 1
    text = (
        f"the champion's loss is {decay.arrivals:.4f} on {decay.pictures} arrivals and {decay.own:.4f} on its own test"
        f" pictures: {share:+.1%} (surely more than {decay.low:+.1%}), {most:.1%} is the limit"
    )
    numbers = {"own": decay.own, "arrivals": decay.arrivals, "share": share, "low": decay.low, "n": decay.pictures}
    return decay.low > most, Reason(DECAY, text, numbers)


def _holds(evidence: Evidence, section: RetrainSection, spoken: set[str]) -> list[Reason]:
    """What stands against a retraining that somebody wants."""
    if not spoken:
        return []
    held = []
    by_hand, first = MANUAL in spoken, FIRST in spoken
    if evidence.problem:
        held.append(Reason(SOURCE, evidence.problem))
    elif first and not by_hand and evidence.refused_first:
        text = f"a first model of the same pictures by the same recipe was refused in {evidence.refused_first}"
        held.append(Reason(REFUSED, f"{text}; add pictures or change the recipe", {"attempt": evidence.refused_first}))
    elif not first and not by_hand and evidence.new_images == 0:
        held.append(Reason(NOTHING_NEW, "nothing arrived that the champion's data lacks", {"new": 0}))
    elif not first and not by_hand:
        held += _refused(evidence) if NEW_IMAGES not in spoken else []
        held += _too_few(evidence.enough) if not held else []
    if not by_hand:
        held += cooldown(evidence, section.cooldown_s)
    return held + _budget(evidence, section)


def _refused(evidence: Evidence) -> list[Reason]:
    """What stands against trying again on much the same pictures: drift and decay stay when an attempt is refused."""
    least = ENOUGH_FRESH * evidence.refused_images
    if not evidence.refused_images or evidence.fresh_images >= max(1.0, least):
        return []
    which = f"{evidence.refused_images} of {evidence.new_images}" if evidence.fresh_images else "all"
    which += "" if evidence.fresh_images else f" {evidence.new_images}"
    text = f"{which} new pictures were in an attempt that was refused"
    if evidence.fresh_images:
        text += f"; it is tried again when {math.ceil(least)} others are there"
    return [Reason(REFUSED, text, {"new": evidence.new_images, "fresh": evidence.fresh_images, "least": least})]


def _too_few(enough: Enough | None) -> list[Reason]:
    """A training that the gate could not judge is in vain."""
    if enough is None or not enough.problem:
        return []
    numbers = {"new": enough.pictures, "test": enough.tests, "train": enough.trains, "least": enough.least}
    return [Reason(TOO_FEW, enough.problem, {**numbers, "unsorted": enough.unsorted})]


def cooldown(evidence: Evidence, cooldown_s: float) -> list[Reason]:
    """The cool-down as what holds a retraining back; empty where it is over."""
    if evidence.last_ended is None:
        return []
    passed = max(0.0, evidence.now - evidence.last_ended)  # a clock may have been set back
    if passed >= cooldown_s:
        return []
    text = f"the last cycle ended {passed:.0f} s ago and the cool-down is {cooldown_s:.0f} s"
    return [Reason(COOLDOWN, text, {"passed_s": passed, "cooldown_s": cooldown_s})]


def _budget(evidence: Evidence, section: RetrainSection) -> list[Reason]:
    held = []
    for kind, limit, spent, planned, what in (
        (BUDGET_STEPS, section.budget_steps_per_week, evidence.spent_steps, evidence.planned_steps, "steps"),
        (
            BUDGET_GPU,
            section.budget_gpu_hours_per_week,
            evidence.spent_gpu_hours,
            evidence.planned_gpu_hours,
            "GPU hours",
        ),
    ):
        if limit and spent + planned > limit:
            text = f"{spent:g} {what} of the last 7 days and {planned:g} to come exceed the budget of {limit:g}"
            held.append(Reason(kind, text, {"spent": spent, "planned": planned, "limit": limit}))
    return held
