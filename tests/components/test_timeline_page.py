"""The timeline's page: all parts of a full story, none of an empty one, bounded for a long one, never any code."""

import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from cluster.reigns import reigns
from components.report import Card
from components.story import Entry, Look, Story, Stream
from components.timeline import tell
from components.timeline_lanes import MOST_MARKS, MOST_TICKS, Axis, axis_of, draw_lanes, ticks
from components.timeline_page import lead, make_timeline_page
from components.timeline_plots import MOST_POINTS, points_of
from components.timeline_words import counted, deciding, lasting, short, when
from tests.journals import BEGIN, story_lines

IDS = ("monitor", "cycles", "gate", "served", "data", "journal")


def no_link(named: str) -> str:
    return ""


def page_of(lines: list[dict[str, Any]], link: Callable[[str], str] = no_link, pictures: tuple[Card, ...] = ()) -> str:
    return make_timeline_page(tell(lines, "icons", reigns(lines, "icons")), {"Workspace": "w"}, pictures, link)


@pytest.fixture(scope="module")
def full() -> list[dict[str, Any]]:
    return story_lines(7, 700, days=60)


def test_full_story_has_every_part_and_fetches_nothing(full: list[dict[str, Any]]) -> None:
    drawn = Card("Version 8", "icons-run", (("step 600", Image.new("RGB", (40, 40), "teal")),))
    html = page_of(full, lambda named: named.rpartition("/")[2], (drawn,))
    assert all(f'<div id="{name}">' in html for name in IDS)
    assert 'href="promote-icons-version-8.html"' in html and "What they drew" in html
    assert "<script" not in html and "@import" not in html and "http-equiv" not in html
    fetched = [one for one in re.findall(r'(?:src|href)="([^"]*)"', html) if not one.startswith(("#", "data:"))]
    assert all(re.fullmatch(r"promote-icons-version-\d+\.html", one) for one in fetched)
    assert not re.search(r"url\((?!#)", html)


def test_every_drawing_is_well_formed(full: list[dict[str, Any]]) -> None:
    html = page_of(full)
    body = html[html.index("<body>") : html.index("</html>")]
    ElementTree.fromstring(body.replace("xlink:href", "href"))  # HTML knows that prefix without a declaration


def test_empty_story_is_a_page_that_says_so() -> None:
    html = page_of([])
    assert "No champion so far." in html and "<svg" not in html
    assert not any(f'<div id="{name}">' in html for name in IDS)


def test_todays_journal_without_a_loop_has_only_its_own_parts() -> None:
    kinds = ("dataset", "search", "promote", "rollback", "champion_found", "retire")
    html = page_of([line for line in story_lines(7, 700) if line["event"] in kinds])
    there = [name for name in IDS if f'<div id="{name}">' in html]
    assert there == ["gate", "served", "data", "journal"] and ">cycles<" not in html


def test_what_the_journal_says_is_never_code() -> None:
    bad = "<img src=x onerror=alert(1)>\"'&"
    key = {"cycle": f"c{bad}"}
    streams = {bad: {"effect": 0.3, "threshold": 0.1, "p_value": 0.001, "verdict": "drift"}}
    at = {"time": "2026-11-22T10:00:00Z"}
    move = {"name": "icons", "champion": 1, "previous": None, "move": "m", "since": at["time"]}
    judged = {"decision": "promote", "version": 1, "run_id": bad, "dataset": f"icons@{bad}", "report": bad}
    lines = [
        {**at, "event": "dataset", "dataset": f"icons@{bad}", "images": 3, "parent": bad},
        {**at, "event": "monitor", "verdict": bad, "reasons": [bad], "streams": streams, "report": bad},
        {**at, "event": "trigger", "decision": "wait", "reasons": [bad]},
        {**at, "event": "trigger", **key, "decision": "retrain", "reasons": [bad]},
        {
            **at,
            "event": "stage",
            **key,
            "stage": bad,
            "state": bad,
            "error": bad,
            "numbers": {"report": bad},
            "seconds": 3,
        },
        {**at, "event": "promote", **judged, "reasons": [bad, "second"], **move},
        {**at, "event": "cycle", **key, "decision": bad, "reasons": [bad], "run_id": bad, "dataset": bad},
        {**at, "event": bad, "name": "icons", "decision": bad},
    ]
    story = tell(lines, "icons", reigns(lines, "icons"))
    html = make_timeline_page(
        story, {"Workspace": bad}, (Card(bad, bad, ((bad, None),)),), lambda named: bad if named else ""
    )
    assert "<img src=x" not in html and "alert(1)" in html
    assert 'href="<' not in html and 'onerror=alert(1)>"' not in html


def test_long_journal_is_a_page_of_bounded_size_that_says_what_is_left_out() -> None:
    lines = story_lines(5, 10_000)
    html = page_of(lines)
    assert len(html) < 1_500_000
    assert html.count("<article") == 20 and re.search(r"\d+ older cycles are in timeline\.json", html)
    lanes = draw_lanes(tell(lines, "icons", reigns(lines, "icons")))
    assert lanes.count("<g>") <= 7 * MOST_MARKS


def test_alarm_is_never_thinned_away() -> None:
    quiet, loud = Stream(0.5, 0.1, 0.2, "no_drift"), Stream(0.2, 0.1, 0.001, "drift")
    looks = [Look(60.0 * n, "", (), {"images": loud if n == 4321 else quiet}, None, "") for n in range(9000)]
    points = points_of(looks, "images")
    assert len(points) <= MOST_POINTS and (60.0 * 4321, loud) in points
    assert points_of(looks, "captions") == []


def test_looks_of_one_place_show_the_drift_among_them() -> None:
    story = Story(
        "icons", looks=[Look(60.0 * n, "drift" if n == 500 else "no_drift", (), {}, None, "") for n in range(2000)]
    )
    lines = [{"time": "2026-01-01T00:00:00Z", "event": "monitor", "verdict": "no_drift"}]
    story.entries = tell(lines, "icons").entries  # a span of a minute: all looks lie at its ends
    assert draw_lanes(story).count('class="drift"') == 1


@pytest.mark.parametrize("span_s", [0, 1, 59, 600, 5000, 86_400, 9 * 86_400, 400 * 86_400, 4000 * 86_400])
def test_axis_has_a_few_round_ticks_for_any_span(span_s: float) -> None:
    story = Story("icons")
    story.entries = [Entry(BEGIN, "monitor", ""), Entry(BEGIN + span_s, "monitor", "")]
    axis = axis_of(story)
    found = ticks(axis)
    assert len(found) <= MOST_TICKS + 1
    assert all(axis.start <= time <= axis.end for time, _ in found)
    assert len({label for _, label in found}) == len(found)


def test_places_lie_on_the_axis() -> None:
    axis = Axis(100.0, 200.0)
    assert (axis.x(100), axis.x(150), axis.place(200), axis.place(100), axis.place(-5)) == (
        0.0,
        50.0,
        MOST_MARKS - 1,
        0,
        0,
    )


def test_chain_leads_from_the_trigger_to_the_champion(full: list[dict[str, Any]]) -> None:
    html = page_of(full)
    chain = html[html.index('<ol class="chain">') : html.index("</ol>")]
    names = re.findall(r'class="name">(\w+)<', chain)
    assert names == ["trigger", "arrivals", "dataset", "run", "decision", "champion"]


def test_cycle_at_work_is_told_as_such_and_a_lost_end_is_not() -> None:
    begin = {"time": "2026-11-22T10:00:00Z", "event": "stage", "cycle": "c-1", "state": "began"}
    lines = [{**begin, "stage": "prepare"}, {**begin, "stage": "train"}]
    html = page_of(lines)
    assert "prepare end not told · train at work" in html and ">at work</span>" in html
    assert "1 cycle: 1 at work." in lead(tell(lines, "icons"))
    ended = [*lines, {**begin, "event": "cycle", "id": "c-1", "decision": "failed", "reasons": []}]
    assert "train end not told" in page_of(ended)


def test_cycle_that_waited_for_more_pictures_has_ended() -> None:
    at = {"time": "2026-11-22T10:00:00Z", "cycle": "c-1"}
    end = {**at, "event": "cycle", "id": "c-1", "decision": "wait", "reasons": ["found 3 new test pictures"]}
    lines = [{**at, "event": "stage", "state": "done", "stage": "prepare", "seconds": 5}, end]
    html = page_of(lines)
    assert ">waited for more</span>" in html and "c-1: wait" in html and "found 3 new test pictures" in html
    assert 'class="refused"' in html and ">at work</span>" not in html
    assert "1 cycle: 1 waited for more." in lead(tell(lines, "icons"))


def test_stages_are_bars_on_the_scale_of_the_longest_cycle() -> None:
    at = {"time": "2026-11-22T10:00:00Z", "event": "stage", "state": "done"}
    lines = [
        {**at, "cycle": "long", "stage": "train", "seconds": 75},
        {**at, "cycle": "long", "stage": "gate", "seconds": 25},
        {**at, "cycle": "short", "stage": "train", "seconds": 50},
    ]
    bars = re.findall(r'<svg class="bar" height="14">(.*?)</svg>', page_of(lines))
    places = [re.findall(r'x="([\d.]+)%" width="([\d.]+)%"', bar) for bar in bars]
    assert places == [[("0.000", "50.000")], [("0.000", "75.000"), ("75.000", "25.000")]]


def test_words() -> None:
    assert [lasting(seconds) for seconds in (None, 4.4, 61, 3700, 90_000)] == [
        "?",
        "4 s",
        "1 min 1 s",
        "1 h 1 min",
        "1 d 1 h",
    ]
    assert (counted(1, "cycle"), counted(1200, "line")) == ("1 cycle", "1,200 lines")
    assert when(BEGIN) == "1 Jan 2026 00:00" and len(short("x" * 5000)) < 300
    assert deciding(["a", "b 5%", "c"]) == "b 5%" and deciding(["a", "b"]) == "a" and deciding([]) == ""
