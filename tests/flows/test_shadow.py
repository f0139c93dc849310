"""Shadows: the champion's requests drawn a second time, counted, never in the way of anybody."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest

from cluster.request_shares import in_share
from cluster.role_metrics import STATISTICS, RoleTallies
from components.draw_requests import Done, DrawRequest, Event
from components.engine_status import EngineLimits
from components.models import Parts, make_tiny
from components.picture_statistics import picture_statistics
from components.sampler import PictureRequest, draw
from components.step_batch import StepBatchEngine
from flows.shadow import PRIORITY, SALT, SUFFIX, Shadows
from tests.endpoint import wait_for

NONE = {"done": 0, "failed": 0, "cancelled": 0}


class Desk:
    """An engine with a champion and a challenger, whose steps the test makes."""

    def __init__(self, champion: Parts, challenger: Parts, share: float = 1.0, **limits: Any) -> None:
        self.engine = StepBatchEngine(EngineLimits(**limits))
        self.engine.load("champion", champion)
        self.engine.load("challenger", challenger, serve=False)
        self.tallies = RoleTallies()
        self.shadows = Shadows(self.engine, self.tallies, share)
        self.ended: list[Event] = []

    def ask(self, name: str, *rows: PictureRequest) -> DrawRequest:
        request = DrawRequest(name, rows or (picture(1),), deadline_s=500.0, partial_images=1)
        self.engine.submit(request, self.ended.append)
        self.shadows.offer(request, lambda: "challenger")
        return request

    def waits(self, num_rows: int) -> None:
        wait_for(lambda: self.engine.status().waiting_rows == num_rows)

    def finish(self) -> None:
        while self.engine.step():
            pass

    @property
    def outcomes(self) -> dict[str, int]:
        found = self.tallies.read().get("shadow", {"outcomes": NONE})["outcomes"]
        return {name: count for name, count in found.items() if count}


def picture(seed: int, steps: int = 3) -> PictureRequest:
    return PictureRequest("a red circle", seed=seed, steps=steps, width_px=16, height_px=16)


@pytest.fixture(scope="module")
def parts() -> tuple[Parts, Parts]:
    return make_tiny("stable_diffusion", seed=0), make_tiny("stable_diffusion", seed=1)


@pytest.fixture
def desk(parts: tuple[Parts, Parts]) -> Iterator[Desk]:
    desk = Desk(*parts, max_waiting_rows=16)
    yield desk
    desk.shadows.close()
    desk.engine.close(drain=False)


def test_shadow_draws_the_same_rows_and_seeds_with_the_challenger(desk: Desk, parts: tuple[Parts, Parts]) -> None:
    rows = (picture(5), picture(6))
    desk.ask("request", *rows)
    desk.waits(4)
    desk.finish()
    wait_for(lambda: desk.tallies.read().get("shadow", {}).get("pictures") == 2)
    tally = desk.tallies.read()["shadow"]
    alone = [asdict(picture_statistics(one)) for one in draw(parts[1], list(rows))]
    for name in STATISTICS:
        # A level of 255 for each picture: rows of another batch size round differently.
        assert tally["statistics"][name] == pytest.approx(sum(one[name] for one in alone), abs=2 / 255)
    assert desk.outcomes == {"done": 1} and sum(tally["buckets"]) == 1 and tally["seconds"] > 0
    wait_for(lambda: isinstance(desk.ended[-1], Done))
    assert all(event.request_id == "request" for event in desk.ended), "the client hears of its own pictures alone"


def test_shadow_stands_back(desk: Desk) -> None:
    desk.ask("first", picture(1, steps=30))
    desk.waits(2)
    for _ in range(20):
        desk.engine.step()
    shadow = desk.engine._requests["first" + SUFFIX]
    champion = desk.engine._requests["first"]
    assert shadow.request.priority == PRIORITY and shadow.request.deadline_s is None
    assert shadow.rows[0].step <= 1 and champion.rows[0].step >= 19


def test_shadow_is_cancelled_with_its_request_and_counted_once(desk: Desk) -> None:
    desk.ask("first", picture(1, steps=30))
    desk.waits(2)
    desk.engine.step()
    desk.engine.cancel("first")
    desk.shadows.cancel("first")
    desk.shadows.cancel("first")
    assert list(desk.engine._requests) == [] and desk.outcomes == {"cancelled": 1}
    desk.ask("second")
    desk.shadows.cancel_all()
    wait_for(lambda: desk.outcomes == {"cancelled": 2})
    desk.finish()
    wait_for(lambda: len(desk.engine._requests) == 0)
    assert desk.outcomes == {"cancelled": 2}


def test_shadow_that_finds_no_room_is_dropped_and_the_queue_stays_the_champions(desk: Desk) -> None:
    """A quarter of 16 places: the fifth shadow is dropped, and 12 requests of the champion still find room."""
    for number in range(4):
        desk.ask(f"request-{number}")
    desk.waits(8)
    for number in range(4, 12):
        desk.ask(f"request-{number}")
    desk.waits(16)
    assert desk.outcomes == {"dropped": 8}
    desk.finish()
    wait_for(lambda: desk.outcomes == {"dropped": 8, "done": 4})
    desk.ask("later")
    desk.waits(2)
    desk.finish()
    wait_for(lambda: desk.outcomes == {"dropped": 8, "done": 5})


def test_shadow_without_a_challenger_or_place_in_the_engine_is_dropped(desk: Desk) -> None:
    request = DrawRequest("request", (picture(1),))
    desk.shadows.offer(request, lambda: None)
    wait_for(lambda: desk.outcomes == {"dropped": 1})
    for number in range(16):
        desk.engine.submit(DrawRequest(f"request-{number}", (picture(1),)), desk.ended.append)
    desk.shadows.offer(request, lambda: "challenger")
    wait_for(lambda: desk.outcomes == {"dropped": 2})


def test_share_decides_which_requests_have_a_shadow(parts: tuple[Parts, Parts]) -> None:
    desk = Desk(*parts, share=0.5, max_waiting_rows=256)
    for number in range(40):
        desk.ask(f"request-{number}")
    shadowed = [f"request-{number}" for number in range(40) if in_share(f"request-{number}", 0.5, SALT)]
    desk.waits(40 + len(shadowed))
    assert {name.removesuffix(SUFFIX) for name in desk.engine._requests if name.endswith(SUFFIX)} == set(shadowed)
    assert 0 < len(shadowed) < 40
    desk.shadows.close()
    assert desk.outcomes == {"cancelled": len(shadowed)}
    desk.engine.close(drain=False)
