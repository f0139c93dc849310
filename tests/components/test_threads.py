"""The number of threads that draws fastest is found and kept."""

import threading
import time

import pytest
import torch

from components.threads import settle_threads


@pytest.fixture(autouse=True)
def restored() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("cost_s", "best"), [(lambda n: 0.02 * n, 1), (lambda n: 0.08 / n, 8), (lambda n: 0.02, 1)])
def test_fewer_threads_are_taken_unless_more_are_clearly_faster(cost_s: object, best: int) -> None:
    tried: list[int] = []

    def draw() -> None:
        tried.append(torch.get_num_threads())
        time.sleep(cost_s(tried[-1]))  # type: ignore[operator]

    assert settle_threads(draw, 8) == best == torch.get_num_threads()
    assert tried[0] == 8
    seen: list[int] = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [best]


def test_error_of_a_first_picture_reaches_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        settle_threads(lambda: 1 / 0, 2)
