"""When new pictures are enough to learn from and to judge by, as a table."""

import pytest

from components.enough import Enough


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (Enough(200, 20, 160, 20), ""),
        (Enough(200, 19, 160, 20), "expects 20 new test pictures (gate.min_test_pictures), found 19 among 200 new"),
        (Enough(0, 0, 0, 2, unsorted=2), ""),
        (Enough(0, 0, 0, 3, unsorted=2), "found 0 among 0 new pictures and 2 that are not examined yet"),
        (Enough(100, 15, 70, 20, unsorted=50, share=0.1), ""),
        (Enough(100, 15, 70, 20, unsorted=49, share=0.1), "found 15 among 100 new pictures and 49"),
        (Enough(25, 25, 0, 20), "new training pictures are expected, found none among 25 new pictures"),
        (Enough(25, 25, 0, 20, unsorted=1), ""),
    ],
)
def test_what_is_missing_is_named(found: Enough, problem: str) -> None:
    assert problem in found.problem and bool(problem) is bool(found.problem)
    assert not problem or "wait for more" in found.problem
