"""The spending rule: what the levels add up to, and how many false alarms come of it, however looks hang together."""

import numpy as np
import pytest
from scipy import special

from components.errors import InputError
from components.false_alarms import DAY_S, HIGHEST_LEVEL, YEAR_S, Ledger, next_look, shares


def levels_at(times_s: list[float], per_year: float = 1.0, most_saved_s: float = 7 * DAY_S) -> list[float]:
    ledger, levels = Ledger(last_s=0.0), []
    for time_s in times_s:
        level, ledger = next_look(ledger, time_s, per_year, most_saved_s)
        levels.append(level)
    assert ledger.spent == pytest.approx(sum(levels)) and ledger.looks == len(times_s)
    return levels


def test_daily_looks_of_a_year_spend_the_budget_in_equal_parts():
    levels = levels_at([day * DAY_S for day in range(1, 366)])
    assert sum(levels) == pytest.approx(1) and max(levels) == pytest.approx(1 / 365)


def test_irregular_looks_spend_what_has_come_in_since_the_look_before():
    assert levels_at([0.5 * DAY_S, 0.5 * DAY_S + 60, 3 * DAY_S]) == pytest.approx(
        [0.5 / 365, 60 / YEAR_S, (2.5 - 60 / DAY_S) / 365]
    )


def test_budget_of_a_long_pause_is_lost_but_for_a_week():
    assert levels_at([100 * DAY_S, 101 * DAY_S]) == pytest.approx([7 / 365, 1 / 365])


def test_any_stretch_of_looks_spends_at_most_its_time_and_the_savings():
    generator = np.random.default_rng(0)
    times = np.cumsum(generator.exponential(2 * DAY_S, 400)).tolist()
    levels = levels_at(times, per_year=3.0)
    for first in range(0, 400, 20):
        for last in range(first, 400, 20):
            allowed = 3.0 * (times[last] - times[first] + 7 * DAY_S) / YEAR_S
            assert sum(levels[first : last + 1]) <= allowed + 1e-12


def test_look_at_the_time_of_the_look_before_or_earlier_may_reject_nothing():
    level, ledger = next_look(Ledger(last_s=1000.0), 900.0, 1.0)
    assert level == 0 and ledger.last_s == 1000.0
    assert next_look(ledger, 1000.0, 1.0)[0] == 0


def test_look_that_is_not_taken_keeps_its_share():
    ledger = Ledger(last_s=0.0)
    next_look(ledger, DAY_S, 1.0)  # too few items: the old ledger is kept
    assert next_look(ledger, 2 * DAY_S, 1.0)[0] == pytest.approx(2 / 365)


def test_no_budget_makes_a_single_look_loose():
    assert next_look(Ledger(last_s=0.0), 7 * DAY_S, 1000.0)[0] == HIGHEST_LEVEL


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.95, 1.0])
def test_false_alarms_of_a_year_are_as_many_as_the_budget_however_looks_hang_together(correlation):
    """20,000 years of 365 looks whose p-values share a part: a pinned reference, or windows that overlap."""
    generator = np.random.default_rng(int(100 * correlation))
    levels = np.array(levels_at([day * DAY_S for day in range(1, 366)]))
    counts = []
    for _ in range(20):
        shared, own = generator.normal(size=(1000, 1)), generator.normal(size=(1000, 365))
        p_values = special.ndtr(np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own)
        counts.append((p_values <= levels).sum(axis=1))
    alarms = np.concatenate(counts)
    error = alarms.std() / np.sqrt(len(alarms))  # years are independent, looks are not
    assert abs(alarms.mean() - 1) <= 4 * error and error < 0.2


def test_testing_every_look_at_five_percent_would_fail_the_same_simulation():
    p_values = np.random.default_rng(0).uniform(size=(1000, 365))
    assert (p_values <= 0.05).sum(axis=1).mean() > 17


def test_share_of_a_level_is_an_equal_part():
    assert shares(0.01, 4) == 0.0025
    with pytest.raises(InputError, match="at least 1 test"):
        shares(0.01, 0)


@pytest.mark.parametrize(("per_year", "most_saved_s"), [(0.0, 1.0), (-1.0, 1.0), (np.nan, 1.0), (1.0, 0.0)])
def test_budget_that_is_none_is_refused(per_year, most_saved_s):
    with pytest.raises(InputError, match="above 0"):
        next_look(Ledger(last_s=0.0), DAY_S, per_year, most_saved_s)
