"""The number of threads that draws fastest is found and kept."""

import threading
import time

import pytest
import torch

from components.threads import calls_at_once, settle_once, settle_threads


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


def test_process_settles_once_and_long_pictures_are_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.threads._settled", None)
    monkeypatch.setattr("components.threads._at_once", 1)
    drawn: list[int] = []

    def slow() -> None:
        drawn.append(torch.get_num_threads())
        time.sleep(0.02)

    monkeypatch.setattr("components.threads.LONG_S", 0.01)
    assert settle_once(slow, 2) == 2 and drawn == [2]
    assert settle_once(slow, 8, asked=5) == 2 == torch.get_num_threads() and drawn == [2]
    monkeypatch.setattr("components.threads._settled", None)
    assert settle_once(slow, 8, asked=5) == 5 and drawn == [2]
    assert calls_at_once() == 1, "who asks for a number of threads gets no more"


def test_cores_that_a_call_leaves_idle_make_other_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.threads._settled", None)
    monkeypatch.setattr("components.threads._at_once", 1)
    monkeypatch.setattr("components.threads.settle_threads", lambda draw, most: 2)
    before = torch.get_num_threads()
    try:
        assert settle_once(lambda: None, 9) == 2 and calls_at_once() == 4
    finally:
        torch.set_num_threads(before)
