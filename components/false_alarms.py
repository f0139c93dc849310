"""At which level may this look test, so that all looks together stay within a yearly budget of false alarms?

The budget flows in with time, `per_year` a year, and each look spends what has come in since the look before (at most
`most_saved_s` of it, so that a long pause does not buy one careless look). A look's level depends on the clock alone,
never on what was seen. So the expected number of false alarms of any set of looks is at most the sum of their levels:
expectations add up whatever the looks have in common, such as overlapping windows or one pinned reference. This is the
per-family error rate of Bonferroni (Gordon et al. 2007, doi:10.1214/07-AOAS102) spent over time as Lan & DeMets (1983,
doi:10.1093/biomet/70.3.659) spend a trial's level. Rules that earn level back (alpha-investing, LORD) bound a false
discovery rate and want independent looks. What is bounded is an average over references: an unlucky reference alarms
more often than the budget, most references less.
"""

import math
from dataclasses import dataclass

from components.errors import InputError

DAY_S = 86_400.0
YEAR_S = 365 * DAY_S
HIGHEST_LEVEL = 0.05
"""However large the budget, a single look tests no looser."""


@dataclass(frozen=True)
class Ledger:
    """What has been spent; keep it with the reference, and a new one with each new reference."""

    last_s: float
    """Time of the last look, or of the pinning of the reference before the first one; seconds since any epoch."""
    spent: float = 0.0
    """Sum of all levels so far: the expected number of false alarms is at most this."""
    looks: int = 0


def next_look(ledger: Ledger, now_s: float, per_year: float, most_saved_s: float = 7 * DAY_S) -> tuple[float, Ledger]:
    """The level of a look at `now_s`, and the ledger after it.

    The level is 0, and nothing may be rejected, where no time has passed. A look that does not test (too few items)
    keeps the old ledger: its share is spent later. Over any time T all levels sum to at most per_year * (T +
    most_saved_s) / year, T being counted between looks.
    """
    for name, value in (("per_year", per_year), ("most_saved_s", most_saved_s)):
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"a false-alarm budget expects {name} above 0, found {value}")
    passed_s = min(max(0.0, now_s - ledger.last_s), most_saved_s)
    level = min(HIGHEST_LEVEL, per_year * passed_s / YEAR_S)
    return level, Ledger(max(now_s, ledger.last_s), ledger.spent + level, ledger.looks + 1)


def shares(level: float, parts: int) -> float:
    """The level of each of `parts` tests of one look (Bonferroni): any of them raises the alarm."""
    if parts < 1:
        raise InputError(f"a level can be shared among at least 1 test, found {parts}")
    return level / parts
