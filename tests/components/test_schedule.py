"""Cron ticks: zones and both changes of the clock, missed ticks as one, and typos that are told by their field."""

from datetime import datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.errors import InputError
from components.schedule import MAX_COUNTED, check, due, following
from flows.config import load_config

BERLIN = "Europe/Berlin"


def at(text: str, zone: str = "UTC", fold: int = 0) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone), fold=fold).timestamp()


@pytest.mark.parametrize(
    ("expression", "zone", "moment", "expected"),
    [
        ("0 3 * * 1", "UTC", "2026-11-22 12:00", "2026-11-23 03:00"),
        ("0 3 * * 1", "UTC", "2026-11-23 03:00", "2026-11-30 03:00"),
        ("0 3 * * *", BERLIN, "2026-07-01 02:59", "2026-07-01 03:00"),
        ("*/15 9-17 * * MON-FRI", BERLIN, "2026-11-20 17:45", "2026-11-23 09:00"),
        ("30 2 * * *", BERLIN, "2026-03-28 12:00", "2026-03-29 03:00"),  # 02:30 does not exist: right after the change
        ("0 0 29 2 *", "UTC", "2026-01-01 00:00", "2028-02-29 00:00"),
    ],
)
def test_next_tick_is_by_the_zones_clock(expression: str, zone: str, moment: str, expected: str) -> None:
    assert following(expression, zone, at(moment, zone)) == at(expected, zone)


def test_a_daily_hour_that_the_autumn_change_repeats_ticks_once() -> None:
    before, second_pass = at("2026-10-25 01:00", BERLIN), at("2026-10-25 02:10", BERLIN, fold=1)
    first = following("30 2 * * *", BERLIN, before)
    assert first == at("2026-10-25 02:30", BERLIN)
    assert following("30 2 * * *", BERLIN, first) == at("2026-10-26 02:30", BERLIN)
    assert following("30 2 * * *", BERLIN, second_pass) == at("2026-10-26 02:30", BERLIN), "its first pass is over"


def test_every_hour_goes_on_evenly_through_both_changes() -> None:
    for day in ("2026-03-29", "2026-10-25"):
        moment, ticks = at(f"{day} 00:00", BERLIN), []
        for _ in range(6):
            moment = following("0 * * * *", BERLIN, moment) or 0
            ticks.append(moment)
        assert {later - earlier for earlier, later in pairwise(ticks)} == {3600}


@settings(deadline=None, max_examples=60)
@given(
    zone=st.sampled_from(["UTC", BERLIN, "America/New_York", "Australia/Lord_Howe", "Africa/Casablanca"]),
    hours=st.integers(0, 24 * 366),
    expression=st.sampled_from(["0 3 * * *", "30 2 * * *", "0 */6 * * *", "15 1 * * 0", "45 * * * *"]),
)
def test_ticks_only_go_forward_in_every_zone(zone: str, hours: int, expression: str) -> None:
    moment = at("2026-01-01 00:17") + 3600.0 * hours
    for _ in range(4):
        after = following(expression, zone, moment)
        assert after is not None and moment < after <= moment + timedelta(days=9).total_seconds()
        moment = after


def test_missed_ticks_count_as_one() -> None:
    last, now = at("2026-11-01 12:00"), at("2026-11-08 12:00")
    found = due("0 3 * * *", "UTC", last, now)
    assert found is not None and (found.first, found.count) == (at("2026-11-02 03:00"), 7)
    assert due("0 3 * * *", "UTC", now, now + 3600) is None
    year = due("* * * * *", "UTC", last, last + 365 * 86400)
    assert year is not None and year.count == MAX_COUNTED, "and it does not count for ever"


def test_a_clock_that_is_set_back_brings_no_tick_twice_and_a_wrong_one_does_not_block_for_ever() -> None:
    heeded = at("2026-11-22 03:00")
    for minutes in range(60):
        assert due("0 3 * * *", "UTC", heeded, at("2026-11-22 02:00") + 60 * minutes) is None
    assert due("0 3 * * *", "UTC", heeded, at("2026-11-23 03:00")) is not None
    next_year = at("2027-11-22 03:00")
    assert due("0 3 * * *", "UTC", next_year, at("2026-11-22 04:00")) is None


@pytest.mark.parametrize(
    ("expression", "told"),
    [
        ("0 25 * * *", "expected an hour, found '25' in field 2"),
        ("61 3 * * *", "expected a minute, found '61' in field 1"),
        ("0 3 * * MOO", "expected a day-of-week, found 'MOO' in field 5"),
        ("0 3 32 * *", "expected a day-of-month, found '32' in field 3"),
        ("0 3 * 13 *", "expected a month, found '13' in field 4"),
        ("0 3 * *", "expected five fields"),
        ("0 0 3 * * 1", "expected five fields"),
        ("@daily", "expected five fields"),
        ("0 3 30 2 *", "never comes"),
        ("0 3 * * 5L/2", "expected a day-of-week, found '5L/2'"),
    ],
)
def test_a_typo_is_told_by_its_field_with_an_example_when_the_config_is_read(expression: str, told: str) -> None:
    with pytest.raises(InputError) as raised:
        load_config(overrides=[f"retrain.schedule='{expression}'"])
    assert str(raised.value).startswith("config retrain.schedule: ") and told in str(raised.value)
    assert "Mondays at 03:00" in str(raised.value) and len(str(raised.value).splitlines()) == 1


def test_what_is_no_zone_is_refused_with_an_example() -> None:
    with pytest.raises(InputError, match=r"config retrain.time_zone: .*Europe/Berlin"):
        load_config(overrides=["retrain.time_zone=Europe/Berlinn"])


@settings(deadline=None, max_examples=300)
@given(st.lists(st.text("0123456789*,-/#LW SUNMONFEBé", max_size=6), min_size=4, max_size=6).map(" ".join))
def test_any_text_is_a_schedule_or_a_clear_error(expression: str) -> None:
    try:
        check(expression)
    except ValueError as error:
        assert "expected" in str(error)
    else:
        assert following(expression, "UTC", 0.0)
