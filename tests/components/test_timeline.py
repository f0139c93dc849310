"""timeline: what is read from journals that are whole, partial, long, strange, or written by a clock that jumped."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.story import Stage, Waits
from components.timeline import tell, time_of
from tests.journals import story_lines


def at(minute: int, event: str, **numbers: Any) -> dict[str, Any]:
    return {"time": f"2026-11-22T10:{minute:02d}:00Z", "event": event, **numbers}


def test_cycle_is_read_from_its_trigger_its_stages_and_its_end() -> None:
    lines = [
        at(0, "trigger", cycle="cycle-0001", decision="retrain", reasons=["412 new pictures"]),
        at(1, "stage", cycle="cycle-0001", stage="prepare", state="began"),
        at(2, "dataset", dataset="icons@b", images=15, parent="icons@a"),
        at(2, "stage", cycle="cycle-0001", stage="prepare", state="done", numbers={"dataset": "icons@b"}, seconds=60.5),
        at(3, "stage", cycle="cycle-0001", stage="train", state="began"),
    ]
    story = tell(lines, "icons")
    (cycle,) = story.cycles
    assert (cycle.id, cycle.trigger, cycle.decision, cycle.ended) == ("cycle-0001", ("412 new pictures",), "", None)
    assert cycle.stages["prepare"] == Stage("prepare", "done", 60.5) and cycle.stages["train"].state == "began"
    assert cycle.dataset == "icons@b" and story.unread == 0
    lines.append(at(4, "stage", cycle="cycle-0001", stage="train", state="failed", error="WorkerError: gone"))
    lines.append(at(5, "cycle", cycle="cycle-0001", id="cycle-0001", decision="failed", reasons=["train: gone"]))
    (cycle,) = tell(lines, "icons").cycles
    assert (cycle.decision, cycle.reasons, cycle.stages["train"].error) == (
        "failed",
        ("train: gone",),
        "WorkerError: gone",
    )
    assert cycle.ended == time_of("2026-11-22T10:05:00Z")


def test_end_of_a_cycle_alone_says_what_its_own_line_says() -> None:
    numbers = {"champion_before": 1, "champion_after": 2, "dataset": "icons@b", "run_id": "r"}
    line = at(5, "cycle", id="c-1", decision="promoted", trigger={"reasons": ["drift"]}, **numbers)
    (cycle,) = tell([line], "icons").cycles
    assert (cycle.id, cycle.trigger, cycle.champion_before, cycle.champion_after) == ("c-1", ("drift",), 1, 2)


def test_waits_in_a_row_are_one_group_whatever_was_looked_at_between() -> None:
    wait = {"decision": "wait"}
    lines = [
        at(0, "trigger", **wait, reasons=["nothing new"]),
        at(1, "monitor", verdict="no_drift", streams={}),
        at(2, "trigger", **wait, reasons=["nothing new"]),
        at(3, "trigger", **wait, reasons=["cool-down"]),
        at(4, "trigger", cycle="c", decision="retrain", reasons=["drift"]),
        at(5, "trigger", **wait, reasons=["cool-down"]),
    ]
    story = tell(lines, "icons")
    first, second = story.waits
    assert first == Waits(time_of(lines[0]["time"]), time_of(lines[3]["time"]), 3, ("nothing new", "cool-down"))  # type: ignore[arg-type]
    assert second.number == 1
    texts = [entry.text for entry in story.entries if entry.event == "wait"]
    assert texts == ["3 times: nothing new; cool-down", "cool-down"]


def test_growth_is_told_only_where_the_parent_is_known() -> None:
    lines = [
        at(0, "dataset", dataset="icons@a", images=10),
        at(1, "dataset", dataset="icons@b", images=15, parent="icons@a"),
        at(2, "dataset", dataset="icons@c", images=25, parent="icons@lost"),
    ]
    assert [one.added for one in tell(lines, "icons").datasets] == [10, 5, None]


def test_other_models_of_the_workspace_are_left_out() -> None:
    lines = [
        at(0, "dataset", dataset="faces@a", images=10),
        at(1, "promote", name="faces", decision="promote", version=1, reasons=[]),
        at(2, "promote", name="icons", decision="hold", version=4, reasons=["open"]),
        at(3, "retire", name="faces", versions=[1]),
    ]
    story = tell(lines, "icons")
    assert ([one.version for one in story.judgements], len(story.entries), story.datasets) == ([4], 1, [])


def test_numbers_that_are_none_are_none() -> None:
    streams = {"images": {"effect": float("nan"), "threshold": True, "p_value": "0.01", "verdict": 3}}
    (look,) = tell([at(0, "monitor", verdict="drift", reasons="no list", streams=streams)], "icons").looks
    assert look.reasons == () and look.streams["images"].effect is None
    assert (look.streams["images"].threshold, look.streams["images"].p_value, look.streams["images"].verdict) == (
        None,
        None,
        "",
    )


def test_clock_that_went_back_is_counted_and_order_stays_that_of_the_lines() -> None:
    lines = [
        at(30, "monitor", verdict="drift"),
        at(10, "monitor", verdict="no_drift"),
        at(20, "monitor", verdict="drift"),
    ]
    story = tell(lines, "icons")
    assert story.went_back == 1 and [look.verdict for look in story.looks] == ["drift", "no_drift", "drift"]
    assert story.span == (time_of(lines[1]["time"]), time_of(lines[0]["time"]))


@pytest.mark.parametrize(
    "line",
    [
        12,
        None,
        "text",
        [],
        {},
        {"event": "monitor"},
        {"time": "yesterday", "event": "monitor"},
        {"time": "0001-01-01T00:00:00Z", "event": "monitor"},
        {"time": "2026-11-22T10:00:00", "event": "monitor"},  # of which time zone?
        {"time": "2026-11-22T10:00:00Z", "event": ["monitor"]},
        {"time": "2026-11-22T10:00:00Z", "event": "monitor"},
        {"time": "2026-11-22T10:00:00Z", "event": "monitor", "verdict": "drift", "streams": [1]},
        {"time": "2026-11-22T10:00:00Z", "event": "stage", "cycle": "c"},
        {"time": "2026-11-22T10:00:00Z", "event": "dataset", "dataset": 3},
        {"time": 10**400, "event": "monitor"},
    ],
)
def test_line_that_is_none_is_counted_and_left_out(line: Any) -> None:
    story = tell([line, at(1, "monitor", verdict="no_drift")], "icons")
    assert len(story.looks) == 1 and story.lines == 2 and story.unread <= 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
KEYS = (
    "cycle",
    "id",
    "stage",
    "state",
    "decision",
    "reasons",
    "streams",
    "numbers",
    "trigger",
    "dataset",
    "images",
    "name",
)
EVENTS = st.sampled_from(("monitor", "trigger", "stage", "cycle", "promote", "dataset", "rollback", "retire", "other"))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no finding
@given(st.lists(st.fixed_dictionaries({"event": EVENTS}, optional=dict.fromkeys(KEYS, JSON)), max_size=3))
def test_whatever_a_line_holds_a_story_comes_out(lines: list[dict[str, Any]]) -> None:
    timed = [{"time": "2026-11-22T10:00:00Z", **line} for line in lines]
    story = tell(timed, "icons", [line for line in timed if line["event"] == "rollback"])
    assert story.lines == len(lines) and story.unread <= len(lines)


def test_generated_journals_are_the_same_for_the_same_seed() -> None:
    first, same, other = (json.dumps(story_lines(seed, 300)) for seed in (1, 1, 2))
    assert first == same != other


def test_long_story_keeps_every_look_and_groups_its_waits() -> None:
    lines = story_lines(3, 10_000)
    story = tell(lines, "icons")
    decisions = [line["decision"] for line in lines if line["event"] == "trigger"]
    waits = decisions.count("wait")
    assert sum(group.number for group in story.waits) == waits > 3000 and len(story.waits) < waits / 20
    assert len(story.looks) == sum(line["event"] == "monitor" for line in lines)
    assert len(story.cycles) == decisions.count("retrain") > 10 and story.unread == 0
