"""When early pictures are due, and where image to image begins."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from components.draw_requests import StartPicture, partial_steps


@pytest.mark.parametrize(
    ("asked", "first", "steps", "expected"),
    [(0, 0, 20, ()), (1, 0, 20, (10,)), (3, 0, 20, (5, 10, 15)), (3, 0, 2, (1,)), (3, 0, 1, ()), (1, 6, 10, (8,))],
)
def test_early_pictures_are_evenly_spaced(asked: int, first: int, steps: int, expected: tuple[int, ...]) -> None:
    assert partial_steps(asked, first, steps) == expected


@given(st.integers(0, 5), st.integers(1, 60), st.floats(0.01, 1.0))
def test_early_pictures_lie_between_start_and_end(asked: int, steps: int, strength: float) -> None:
    first = StartPicture(torch.zeros(1, 4, 4, 4), strength).first_step(steps)
    assert 0 <= first < steps
    due = partial_steps(asked, first, steps)
    assert len(due) <= asked and all(first < step < steps for step in due) and sorted(set(due)) == list(due)


@pytest.mark.parametrize(("strength", "steps", "first"), [(1.0, 8, 0), (0.5, 8, 4), (0.3, 8, 6), (0.01, 8, 7)])
def test_strength_is_the_share_of_steps_that_is_drawn(strength: float, steps: int, first: int) -> None:
    assert StartPicture(torch.zeros(1, 4, 4, 4), strength).first_step(steps) == first
