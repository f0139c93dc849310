"""Are the pictures that arrived enough to learn from, and to judge by? Counts in, what is missing in words out.

The gate compares losses on test pictures that are new to the champion. With too few of them it can only hold, whatever
was trained; so a training that it could not judge is not begun. Pure; how they are counted: `flows/enough.py`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Enough:
    """New pictures by split; `least` is gate.min_test_pictures."""

    pictures: int
    """New ones that were counted."""
    tests: int
    """Test pictures that the gate will compare on."""
    trains: int
    """Training pictures that the champion's data lacks."""
    least: int
    unsorted: int = 0
    """More pictures, whose split is not known before they are examined (rows of a table)."""
    share: float = 1.0
    """Of the unsorted, how many may become test pictures."""

    @property
    def problem(self) -> str:
        """What was expected, what was found, what to do; empty where there is enough."""
        more = f" and {self.unsorted} that are not examined yet" if self.unsorted else ""
        found = f"among {self.pictures} new pictures{more}"
        if self.tests + int(self.unsorted * self.share) < self.least:
            return (
                f"the gate expects {self.least} new test pictures (gate.min_test_pictures), found {self.tests} {found};"
                " wait for more, or set gate.min_test_pictures lower or data.test_fraction higher"
            )
        if not self.trains + self.unsorted:
            return f"new training pictures are expected, found none {found}; wait for more"
        return ""
