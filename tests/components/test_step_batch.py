"""The engine: a seed's picture does not depend on company, every request ends once, and old rows keep old weights."""

import queue
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from components.draw_requests import Cancelled, Done, DrawRequest, Event, Failed, PartialPicture, Progress
from components.engine_status import EngineLimits
from components.errors import DeadlineError, InputError, NonFiniteError, QueueFullError
from components.models import Parts, embedded_base, load_parts, make_tiny
from components.sampler import PictureRequest, draw
from components.step_batch import StepBatchEngine

LIMIT_S = 60.0
"""For a picture of a tiny model on a loaded machine; nothing here sleeps that long."""
SIDE = {"width_px": 16, "height_px": 16}
RED, BLUE = "a red circle", "a blue square"


def make(kind: str) -> Parts:
    return make_tiny("z_image") if kind == "z_image" else make_tiny("stable_diffusion", prediction=kind)


@pytest.fixture(scope="module", params=["v_prediction", "z_image"])
def parts(request: pytest.FixtureRequest) -> Parts:
    return make(request.param)


class Inbox:
    """Receives events in the engine's threads and waits for the last one of a request in the test's."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._arrived = threading.Condition()

    def __call__(self, event: Event) -> None:
        with self._arrived:
            self.events.append(event)
            self._arrived.notify_all()

    def end_of(self, request_id: str) -> Done | Failed | Cancelled:
        def found() -> list[Any]:
            return [e for e in self.of(request_id) if isinstance(e, Done | Failed | Cancelled)]

        with self._arrived:
            assert self._arrived.wait_for(found, LIMIT_S), f"{request_id} has no end, events: {self.events}"
            return found()[0]

    def of(self, request_id: str) -> list[Event]:
        return [event for event in self.events if event.request_id == request_id]

    def pictures(self, request_id: str) -> tuple[Image.Image, ...]:
        end = self.end_of(request_id)
        assert isinstance(end, Done), end
        return end.pictures


class Desk:
    """An engine without its loop thread: the test makes the steps."""

    def __init__(self, *models: Parts, **limits: Any) -> None:
        self.dropped: list[str] = []
        self.inbox = Inbox()
        self.engine = StepBatchEngine(EngineLimits(**limits), self.dropped.append)
        for number, model in enumerate(models):
            self.engine.load(f"v{number + 1}", model)

    def ask(self, request_id: str, *rows: PictureRequest, **options: Any) -> None:
        version = options.pop("version", None)
        self.engine.submit(DrawRequest(request_id, rows, **options), self.inbox, version)

    def finish(self) -> None:
        while self.engine.step():
            pass


@pytest.fixture
def desk(parts: Parts) -> Iterator[Desk]:
    desk = Desk(parts)
    yield desk
    desk.engine.close()


def picture(prompt: str = RED, **options: Any) -> PictureRequest:
    return PictureRequest(prompt, **{"steps": 4, **SIDE, **options})


def difference(left: Image.Image, right: Image.Image) -> int:
    return int(np.abs(np.asarray(left).astype(int) - np.asarray(right).astype(int)).max())


def check_alike(found: tuple[Image.Image, ...], parts: Parts, *rows: PictureRequest) -> None:
    """Compare with each row drawn alone by the sampler: other batch sizes move fp32 latents by about 1e-6."""
    for own, row in zip(found, rows, strict=True):
        assert difference(own, draw(parts, [row])[0]) <= 1, row
    assert all(np.asarray(own).std() > 1 for own in found), "a flat picture would equal anything"


MIXED = [
    picture(RED, seed=1, steps=3),
    picture(BLUE, seed=2, steps=7, guidance_scale=6.0),
    picture(RED, seed=3, steps=5, guidance_scale=1.0),
    picture(BLUE, seed=4, steps=4, guidance_scale=0.0),
    picture(RED, seed=5, steps=2, negative_prompt=BLUE),
    picture(BLUE, seed=6, steps=4, width_px=32),
    picture(RED, seed=7, steps=6, width_px=32, height_px=32),
]


def test_pictures_equal_those_drawn_alone_in_mixed_company(desk: Desk, parts: Parts) -> None:
    for number, row in enumerate(MIXED):
        desk.ask(f"r{number}", row)
    desk.finish()
    for number, row in enumerate(MIXED):
        check_alike(desk.inbox.pictures(f"r{number}"), parts, row)
    steps = desk.engine.counters
    assert steps.row_steps == sum(row.steps for row in MIXED) > steps.steps, "rows did share steps"


@pytest.mark.parametrize("num_rows", [2, 5])
def test_identical_prompts_in_one_batch_are_drawn_by_their_own_seeds(desk: Desk, parts: Parts, num_rows: int) -> None:
    rows = [picture(RED, seed=seed) for seed in [*range(num_rows - 1), 0]]
    desk.ask("r", *rows)
    desk.finish()
    found = desk.inbox.pictures("r")
    check_alike(found, parts, *rows)
    assert difference(found[0], found[-1]) <= 1
    assert num_rows == 2 or difference(found[0], found[1]) > 1
    assert desk.engine.status().text_misses == 2 and desk.engine.status().text_hits == 2 * num_rows - 2


def test_late_joiner_and_cancelled_neighbour_change_no_picture(desk: Desk, parts: Parts) -> None:
    desk.ask("first", picture(RED, seed=1, steps=6))
    desk.ask("gone", picture(BLUE, seed=2, steps=6), picture(BLUE, seed=3, steps=6))
    desk.engine.step()
    desk.engine.step()
    desk.ask("late", picture(BLUE, seed=4, steps=6))
    desk.engine.step()
    assert desk.engine.status().live_rows == 4
    assert desk.engine.cancel("gone")
    desk.engine.step()
    assert desk.engine.status().live_rows == 2, "rows are free at the next step"
    desk.finish()
    check_alike(desk.inbox.pictures("first"), parts, picture(RED, seed=1, steps=6))
    check_alike(desk.inbox.pictures("late"), parts, picture(BLUE, seed=4, steps=6))
    assert desk.inbox.end_of("gone") == Cancelled("gone", steps_saved=6)
    assert desk.engine.counters.steps_saved == 6
    assert not desk.engine.cancel("gone") and not desk.engine.cancel("first")


@pytest.mark.parametrize("seed", range(3))
def test_random_joins_and_cancels_leave_every_picture_as_drawn_alone(desk: Desk, parts: Parts, seed: int) -> None:
    chance = random.Random(seed)
    asked: dict[str, tuple[PictureRequest, ...]] = {}
    for number in range(14):
        rows = tuple(
            picture(
                chance.choice([RED, BLUE]),
                seed=chance.randrange(100),
                steps=chance.randint(1, 6),
                guidance_scale=chance.choice([0.0, 1.0, 3.0, 7.0]),
                width_px=chance.choice([16, 32]),
            )
            for _ in range(chance.choice([1, 1, 2, 4]))
        )
        asked[f"r{number}"] = rows
        desk.ask(f"r{number}", *rows, key=chance.choice("ab"), priority=chance.choice([1.0, 3.0]))
        for _ in range(chance.randrange(4)):
            desk.engine.step()
        if chance.random() < 0.3:
            desk.engine.cancel(f"r{chance.randrange(number + 1)}")
    desk.finish()
    ends = {name: desk.inbox.end_of(name) for name in asked}
    drawn = {name: end for name, end in ends.items() if isinstance(end, Done)}
    assert len(drawn) >= 5 and all(isinstance(end, Done | Cancelled) for end in ends.values())
    for name, end in drawn.items():
        check_alike(end.pictures, parts, *asked[name])
    for name in asked:
        last = desk.inbox.of(name)
        assert sum(isinstance(event, Done | Failed | Cancelled) for event in last) == 1
    assert desk.engine.status().live_rows == desk.engine.status().waiting_rows == 0
    assert desk.engine.status().backlog_pixel_steps == 0


@pytest.mark.parametrize("threads", [1, 2])
def test_strict_mode_is_bit_identical_in_any_company(parts: Parts, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows = [*MIXED, picture("word " * 40, seed=8, steps=3)]
        together, alone = Desk(parts, strict=True, max_batch_rows=6), Desk(parts, strict=True, max_batch_rows=6)
        for number, row in enumerate(rows):
            together.ask(f"r{number}", row)
            together.engine.step()
        together.finish()
        for number, row in enumerate(rows):
            alone.ask(f"r{number}", row)
            alone.finish()
            (left,), (right,) = together.inbox.pictures(f"r{number}"), alone.inbox.pictures(f"r{number}")
            assert difference(left, right) == 0, row
        together.engine.close()
        alone.engine.close()
    finally:
        torch.set_num_threads(before)


def test_embedded_base_draws_in_the_engine_what_the_sampler_draws() -> None:
    base = load_parts(embedded_base())
    desk = Desk(base)
    rows = [
        PictureRequest("a small red circle on a white background", seed=1, steps=8),
        PictureRequest("a large blue square on a black background", seed=2, steps=5, guidance_scale=5.0),
        PictureRequest("a large green star on a white background", seed=3, steps=6, guidance_scale=1.0),
    ]
    desk.ask("r", *rows)
    desk.finish()
    check_alike(desk.inbox.pictures("r"), base, *rows)
    desk.engine.close()


class NoHostSync(TorchDispatchMode):
    """Refuses what would make the host wait for a device: reading a value, sizes that depend on values, copies."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "item", "_to_copy.cpu")

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        assert name not in self.FORBIDDEN, f"{func} waits for the device"
        if name == "index":
            assert all(index is None or index.dtype != torch.bool for index in args[1]), (
                "a mask's size is on the device"
            )
        self.seen += 1
        return func(*args, **(kwargs or {}))


def test_steps_never_read_a_value_on_the_host(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "tolist", lambda self: pytest.fail("tolist reads the device"))
    monkeypatch.setattr(Tensor, "numpy", lambda self: pytest.fail("numpy reads the device"))
    monkeypatch.undo()
    desk.ask("a", picture(RED, steps=4), partial_images=1)
    desk.ask("b", picture(BLUE, steps=3, guidance_scale=0.0))
    desk.engine.step()
    with NoHostSync() as watch:
        desk.engine.step()
        desk.ask_later = None  # type: ignore[attr-defined]
        desk.engine.step()
    assert watch.seen > 50, "the watch saw the denoiser"
    desk.finish()
    assert isinstance(desk.inbox.end_of("a"), Done) and isinstance(desk.inbox.end_of("b"), Done)


def test_progress_and_early_pictures_come_in_order_and_before_the_end(desk: Desk) -> None:
    desk.ask("r", picture(steps=6), picture(seed=1, steps=6), partial_images=2, progress=True)
    desk.finish()
    desk.inbox.end_of("r")
    events = desk.inbox.of("r")
    assert isinstance(events[-1], Done)
    for row in range(2):
        steps = [e.step for e in events if isinstance(e, Progress) and e.row == row]
        assert steps == [1, 2, 3, 4, 5, 6]
        early = [e for e in events if isinstance(e, PartialPicture) and e.row == row]
        # The decoder may drop early ones when final ones wait; those that come are in order.
        assert [e.index for e in early] == sorted({e.index for e in early})
        assert all(e.picture.size == (16, 16) for e in early)


def test_a_row_that_turns_out_not_finite_fails_alone(desk: Desk, parts: Parts) -> None:
    desk.ask("bad", picture(BLUE, seed=1, guidance_scale=float("inf")))
    desk.ask("good", picture(RED, seed=2))
    desk.finish()
    end = desk.inbox.end_of("bad")
    assert isinstance(end, Failed) and isinstance(end.error, NonFiniteError)
    check_alike(desk.inbox.pictures("good"), parts, picture(RED, seed=2))


def test_a_request_the_denoiser_refuses_fails_alone(desk: Desk, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.ask("bad", picture(BLUE, seed=1))
    desk.ask("good", picture(RED, seed=2), picture(RED, seed=3))
    bad = desk.engine._requests["bad"].prepared[0]
    # A state whose width no layer takes: the joined call cannot even be made.
    wide = replace(bad.text, states_BLD=torch.cat([bad.text.states_BLD] * 2, dim=2))
    desk.engine._requests["bad"].prepared[0] = replace(bad, text=wide)
    desk.finish()
    assert isinstance(desk.inbox.end_of("bad"), Failed)
    check_alike(desk.inbox.pictures("good"), parts, picture(RED, seed=2), picture(RED, seed=3))
