"""When the loop trains and when it waits, as a table; every answer carries its reasons and numbers."""

from dataclasses import replace
from typing import Any

import pytest

from components.enough import Enough
from components.standing import RetrainSection
from components.triggers import Decay, Drift, Evidence, decide

NOW = 1_795_600_000.0  # 2026-11-25 09:46:40 UTC, a Wednesday
DAY = 86400.0
QUIET = Evidence(now=NOW, champion=3, last_tick=NOW - 60, last_ended=NOW - 7 * DAY, planned_steps=100)
ARRIVED = replace(QUIET, new_images=500)
DRIFTED = Drift("drift", 0.4, ("images: effect 0.40 (p 0.001)",))
SHORT = Enough(500, 19, 400, 20)
WEEKLY = {"schedule": "0 3 * * 1"}


@pytest.mark.parametrize(
    ("found", "section", "verdict", "kinds"),
    [
        (QUIET, {}, "wait", []),
        (replace(QUIET, champion=None), {}, "retrain", ["first_start"]),
        (
            replace(QUIET, champion=None, refused_first="cycle-0001: slow"),
            {},
            "wait",
            ["first_start", "refused_before"],
        ),
        (replace(QUIET, champion=None, refused_first="cycle-0001: slow", manual="--force"), {}, "retrain", None),
        (replace(QUIET, champion=None, last_ended=NOW - 60), {}, "wait", ["cooldown", "first_start"]),
        (replace(QUIET, new_images=199), {}, "wait", []),
        (replace(QUIET, new_images=200), {}, "retrain", ["new_images"]),
        (ARRIVED, {"min_new_images": 0}, "wait", []),
        (replace(ARRIVED, drift=DRIFTED), {}, "retrain", ["drift", "new_images"]),
        (replace(ARRIVED, drift=DRIFTED), {"on_drift": False, "min_new_images": 0}, "wait", []),
        (replace(QUIET, new_images=20, drift=DRIFTED), {}, "retrain", ["drift"]),
        (replace(QUIET, drift=DRIFTED), {}, "wait", ["drift", "nothing_new"]),
        (replace(QUIET, new_images=20, drift=Drift("no_drift")), {}, "wait", []),
        (replace(QUIET, new_images=20, decay=Decay(1.0, 1.3, 0.2, 20)), {}, "retrain", ["decay"]),
        (replace(QUIET, new_images=20, decay=Decay(1.0, 1.3, 0.05, 20)), {}, "wait", []),  # not surely beyond the limit
        (replace(QUIET, new_images=20, decay=Decay(1.0, 1.3, 0.2, 20)), {"max_decay": 0}, "wait", []),
        (replace(QUIET, new_images=20, decay=Decay(skipped="too dear")), {}, "wait", []),
        (replace(QUIET, manual="--force"), {}, "retrain", ["manual"]),
        (replace(QUIET, manual="--force", last_ended=NOW - 1), {}, "retrain", ["manual"]),
        (replace(ARRIVED, last_ended=NOW - 3599), {}, "wait", ["cooldown", "new_images"]),
        (replace(ARRIVED, last_ended=NOW - 3600), {}, "retrain", ["new_images"]),
        (replace(ARRIVED, last_ended=None), {}, "retrain", ["new_images"]),
        (replace(ARRIVED, last_ended=NOW - 60), {"cooldown_s": 0}, "retrain", ["new_images"]),
        (replace(ARRIVED, refused_images=500), WEEKLY, "wait", []),
        (replace(ARRIVED, refused_images=500, drift=DRIFTED), {}, "wait", ["drift", "refused_before"]),
        (replace(ARRIVED, refused_images=301), {}, "wait", []),  # 199 are fresh
        (replace(ARRIVED, refused_images=300), {}, "retrain", ["new_images"]),
        (replace(ARRIVED, refused_images=460, drift=DRIFTED), {}, "wait", ["drift", "refused_before"]),  # 40 < a tenth
        (replace(ARRIVED, refused_images=450, drift=DRIFTED), {}, "retrain", ["drift"]),
        (replace(QUIET, new_images=60, refused_images=50, drift=DRIFTED), {"min_new_images": 5}, "retrain", None),
        (replace(ARRIVED, refused_images=500, manual="--force"), {}, "retrain", ["manual"]),
        (replace(ARRIVED, enough=SHORT), {}, "wait", ["new_images", "too_few_pictures"]),
        (replace(ARRIVED, enough=SHORT, manual="--force"), {}, "retrain", ["manual", "new_images"]),
        (replace(ARRIVED, enough=Enough(500, 20, 400, 20)), {}, "retrain", ["new_images"]),
        (replace(QUIET, enough=SHORT), WEEKLY, "wait", []),
        (replace(ARRIVED, problem="the bucket does not answer"), {}, "wait", ["new_images", "source"]),
        (replace(ARRIVED, last_tick=NOW - 3 * DAY), WEEKLY, "retrain", ["new_images", "schedule"]),
        (replace(QUIET, last_tick=NOW - 3 * DAY), WEEKLY, "wait", ["nothing_new", "schedule"]),
        (replace(ARRIVED, spent_steps=901), {"budget_steps_per_week": 1000}, "wait", ["budget_steps", "new_images"]),
        (replace(ARRIVED, spent_steps=900), {"budget_steps_per_week": 1000}, "retrain", ["new_images"]),
        (replace(ARRIVED, manual="x", spent_steps=901), {"budget_steps_per_week": 1000}, "wait", None),
        (
            replace(ARRIVED, spent_gpu_hours=9.5, planned_gpu_hours=1.0),
            {"budget_gpu_hours_per_week": 10},
            "wait",
            ["budget_gpu_hours", "new_images"],
        ),
    ],
)
def test_decision(found: Evidence, section: dict[str, Any], verdict: str, kinds: list[str] | None) -> None:
    decision = decide(found, RetrainSection(**section))
    assert decision.verdict == verdict
    assert kinds is None or decision.kinds == [verdict, *kinds]
    assert decision.reasons and all(decision.reasons), "it always says why"


def test_all_triggers_that_speak_are_merged_with_their_numbers() -> None:
    found = replace(ARRIVED, drift=DRIFTED, decay=Decay(0.5, 0.75, 0.4, 60), manual="--force", last_tick=NOW - 30 * DAY)
    decision = decide(found, RetrainSection(schedule="0 3 * * *"))
    assert [reason.kind for reason in decision.triggers] == ["manual", "schedule", "new_images", "drift", "decay"]
    assert decision.reasons == [
        "asked for by hand (--force)",
        "the schedule '0 3 * * *' ticked at 2026-10-27 03:00 UTC, 30 ticks taken as one",
        "500 new pictures, 200 are enough",
        "the monitor says drift: images: effect 0.40 (p 0.001)",
        "the champion's loss is 0.7500 on 60 arrivals and 0.5000 on its own test pictures: +50.0% (surely more than"
        " +40.0%), 10.0% is the limit",
    ]
    assert decision.numbers["drift"] == {"verdict": "drift", "effect": 0.4, "report": ""}
    assert decision.numbers["schedule"]["ticks"] == 30


def test_what_waits_at_the_source_and_what_it_has_lost_is_told_whatever_is_decided() -> None:
    found = replace(QUIET, pending={"caption_not_here_yet": 500, "still_changing": 3, "zero_bytes": 1}, missing=40)
    waits, trains = (decide(one, RetrainSection()) for one in (found, replace(found, new_images=200)))
    notes = [
        "501 files wait: no caption (500), empty (1)",
        "3 files wait: still changing",
        "40 files of the champion's data are gone from the source or were replaced; its dataset version keeps them",
    ]
    assert waits.reasons[1:] == notes and trains.reasons == ["200 new pictures, 200 are enough", *notes]
    assert waits.numbers["pending"] == {"caption_not_here_yet": 500, "zero_bytes": 1}
    assert waits.numbers["missing"] == {"files": 40} and waits.numbers["changing"] == {"still_changing": 3}
    assert waits.kinds == ["wait", "missing", "pending"], "what passes by itself makes no new wait"


def test_no_comes_with_because_and_with_what_was_asked_for() -> None:
    found = replace(ARRIVED, last_ended=NOW - 60, spent_steps=950)
    decision = decide(found, RetrainSection(budget_steps_per_week=1000))
    assert decision.reasons == [
        "no, because the last cycle ended 60 s ago and the cool-down is 3600 s",
        "no, because 950 steps of the last 7 days and 100 to come exceed the budget of 1000",
        "asked for: 500 new pictures, 200 are enough",
    ]
    silent = decide(QUIET, RetrainSection(schedule="0 3 * * 1"))
    assert silent.reasons == [
        "no trigger: the next tick of '0 3 * * 1' is 2026-11-30 03:00 UTC; 0 new pictures, 200 are enough; the monitor"
        " was not asked; decay was not measured: nobody looked"
    ]


@pytest.mark.parametrize(
    ("found", "heeded"),
    [
        (ARRIVED, True),  # it trains
        (QUIET, True),  # nothing to train on: this tick is over
        (replace(ARRIVED, refused_images=500), True),
        (replace(ARRIVED, enough=SHORT), True),  # nothing that the gate could judge: this tick is over
        (replace(ARRIVED, last_ended=NOW - 60), False),  # it comes after the cool-down
        (replace(ARRIVED, spent_steps=10_000), False),
        (replace(ARRIVED, problem="nothing answers"), False),
    ],
)
def test_a_tick_stays_due_while_cool_down_budget_or_source_hold_it_back(found: Evidence, heeded: bool) -> None:
    section = RetrainSection(schedule="0 3 * * *", budget_steps_per_week=1000, min_new_images=0)
    assert decide(replace(found, last_tick=NOW - DAY), section).heed_tick is heeded


def test_a_clock_that_jumps_back_an_hour_starts_nothing_twice_and_blocks_nothing() -> None:
    section = RetrainSection(schedule="0 * * * *")
    after = replace(ARRIVED, new_images=10, last_tick=NOW, last_ended=NOW)
    for minutes in range(60):
        back = replace(after, now=NOW - 3600 + 60 * minutes)
        assert decide(back, section).verdict == "wait"
        assert decide(replace(back, manual="--force"), section).verdict == "retrain"
    assert decide(replace(after, now=NOW + 7200), section).kinds == ["retrain", "schedule"]
