"""The engine: a seed's picture does not depend on company, every request ends once, and old rows keep old weights."""

import gc
import random
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from components.draw_requests import Cancelled, Done, DrawRequest, Event, Failed, PartialPicture, Progress
from components.errors import DeadlineError, InputError, NonFiniteError, QueueFullError
from components.models import Parts, embedded_base, latent_factor, load_parts, make_tiny, size_multiple_px
from components.sampler import PictureRequest, draw
from components.start_pictures import make_start
from tests.engine_desk import BLUE, RED, Desk, check_alike, difference, make, picture


@pytest.fixture(scope="module", params=["v_prediction", "z_image"])
def parts(request: pytest.FixtureRequest) -> Parts:
    return make(request.param)


@pytest.fixture
def desk(parts: Parts) -> Iterator[Desk]:
    desk = Desk(parts)
    yield desk
    desk.engine.close()


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


def test_edits_among_others_equal_those_drawn_alone(desk: Desk, parts: Parts) -> None:
    before = Image.radial_gradient("L").resize((16, 16)).convert("RGB")
    hole = Image.new("L", (16, 16), 0)
    hole.paste(255, (8, 0, 16, 16))
    rows = {"redrawn": picture(RED, seed=11, steps=6), "repaired": picture(BLUE, seed=12, steps=5, guidance_scale=6.0)}
    starts = {
        "redrawn": make_start(parts, before, None, (16, 16), 0.6),
        "repaired": make_start(parts, before, hole, (16, 16), 1.0),
    }
    for number, row in enumerate(MIXED):
        desk.ask(f"r{number}", row)
        if number == 1:
            desk.ask("redrawn", rows["redrawn"], start=starts["redrawn"])
            desk.engine.step()
            desk.ask("repaired", rows["repaired"], start=starts["repaired"])
    desk.engine.step()
    assert desk.engine.status().live_rows >= len(MIXED), "edits and others are at work together"
    desk.finish()
    for name, row in rows.items():
        alone = Desk(parts)
        alone.ask("edit", row, start=starts[name])
        alone.finish()
        (found,), (expected,) = desk.inbox.pictures(name), alone.inbox.pictures("edit")
        alone.engine.close()
        # As in `check_alike`: other batch sizes move fp32 latents by about 1e-6.
        assert difference(found, expected) <= 1, name
        assert difference(found, draw(parts, [row])[0]) > 1, "the start picture had no effect"
    for number, row in enumerate(MIXED):
        check_alike(desk.inbox.pictures(f"r{number}"), parts, row)


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


@pytest.mark.parametrize("seed", range(8))
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
        at_work = sorted(desk.engine._requests)
        if at_work and chance.random() < 0.3:
            assert desk.engine.cancel(chance.choice(at_work))
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
    """Refuses what would make the host wait for a device: reading a value, and sizes that depend on values.

    Copies between host and device cannot be seen here: on a CPU there are none.
    """

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "item")

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


def test_steps_never_read_a_value_on_the_host(desk: Desk) -> None:
    desk.ask("a", picture(RED, steps=4), partial_images=1)
    desk.ask("b", picture(BLUE, steps=3, guidance_scale=0.0))
    with NoHostSync() as watch:
        desk.engine.step()
        desk.engine.step()
        desk.engine.step()
    assert watch.seen > 50, "the watch saw the denoiser"
    desk.finish()
    assert isinstance(desk.inbox.end_of("a"), Done) and isinstance(desk.inbox.end_of("b"), Done)


def test_the_watch_for_host_reads_sees_them() -> None:
    """Else the test above proves nothing: reads by item, by truth and by a mask's size."""
    values = torch.ones(3)
    for read in (lambda: values[0].item(), lambda: bool(values.all()), lambda: values[values > 0]):
        with pytest.raises(AssertionError), NoHostSync():
            read()


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


def test_a_request_the_denoiser_refuses_fails_alone(desk: Desk, parts: Parts) -> None:
    def refuse(module: Any, args: Any) -> None:
        if max(float(row.abs().max()) for row in args[0]) > 1e5:
            raise RuntimeError("out of range")

    hook = parts.denoiser.register_forward_pre_hook(refuse)
    desk.ask("bad", picture(BLUE, seed=1))
    desk.ask("good", picture(RED, seed=2), picture(RED, seed=3))
    desk.ask("other", picture(BLUE, seed=4))
    prepared = desk.engine._requests["bad"].prepared
    prepared[0] = replace(prepared[0], latents_BCHW=prepared[0].latents_BCHW * 1e9)
    desk.finish()
    hook.remove()
    end = desk.inbox.end_of("bad")
    assert isinstance(end, Failed) and str(end.error) == "out of range"
    check_alike(desk.inbox.pictures("good"), parts, picture(RED, seed=2), picture(RED, seed=3))
    check_alike(desk.inbox.pictures("other"), parts, picture(BLUE, seed=4))


def test_rows_finish_on_the_weights_they_began_with() -> None:
    old, new = make("epsilon"), make_tiny("stable_diffusion", seed=1)
    row = picture(RED, seed=3, steps=4)
    assert difference(draw(old, [row])[0], draw(new, [row])[0]) > 1
    desk = Desk(old, max_batch_rows=2)
    desk.ask("begun", row)
    desk.ask("waiting", row)
    desk.engine.step()
    desk.engine.load("v2", new)
    desk.ask("after", row)
    assert desk.engine.status().versions == {"v1": 1, "v2": 2} and desk.dropped == []
    desk.finish()
    for name, model, version in (("begun", old, "v1"), ("waiting", new, "v2"), ("after", new, "v2")):
        end = desk.inbox.end_of(name)
        assert isinstance(end, Done) and end.version == version
        check_alike(end.pictures, model, row)
    desk.engine.close()
    assert desk.dropped == ["v1"] and desk.engine.status().versions == {"v2": 0}


def test_a_version_beside_the_serving_one_draws_for_those_who_name_it_until_it_retires() -> None:
    desk = Desk(make("epsilon"))
    desk.engine.load("challenger", make_tiny("stable_diffusion", seed=1), serve=False)
    desk.ask("a", picture())
    desk.ask("b", picture(), version="challenger")
    desk.engine.retire("challenger")
    with pytest.raises(InputError, match=r"those that serve \(v1\), found 'challenger'"):
        desk.ask("c", picture(), version="challenger")
    desk.finish()
    versions = {name: desk.inbox.end_of(name) for name in "ab"}
    desk.engine.close()
    assert {name: end.version for name, end in versions.items() if isinstance(end, Done)} == {
        "a": "v1",
        "b": "challenger",
    }
    assert desk.dropped == ["challenger"]


def test_a_version_that_was_tried_serves_without_being_loaded_again() -> None:
    tried = make_tiny("stable_diffusion", seed=1)
    desk = Desk(make("epsilon"), max_batch_rows=2)
    desk.engine.load("tried", tried, serve=False)
    row = picture(RED, seed=3, steps=4)
    for name, version in (("begun", None), ("waiting", None), ("held", "v1"), ("named", "tried")):
        desk.ask(name, row, version=version)
    desk.engine.step()
    desk.engine.serve("tried")
    desk.engine.serve("tried")
    desk.ask("after", row)
    desk.finish()
    ends = {name: desk.inbox.end_of(name) for name in ("begun", "waiting", "held", "named", "after")}
    drawn = {name: end.version for name, end in ends.items() if isinstance(end, Done)}
    assert drawn == {"begun": "v1", "waiting": "tried", "held": "v1", "named": "tried", "after": "tried"}
    check_alike(desk.inbox.pictures("waiting"), tried, row)
    desk.engine.close()
    assert desk.dropped == ["v1"]


def test_a_size_that_the_new_model_cannot_draw_is_drawn_by_the_old_one_or_refused_and_hurts_nobody() -> None:
    """Stable Diffusion draws every latent cell, Z-Image pairs of them."""
    old, new = make("epsilon"), make("z_image")
    odd = picture(RED, seed=3, width_px=16 + latent_factor(old))
    even = picture(RED, seed=4)
    assert size_multiple_px(new) == 2 * latent_factor(new) and odd.width_px % size_multiple_px(new)
    desk = Desk(old, max_batch_rows=2)
    for name, row in (("at work", even), ("waits", odd), ("moves", even)):
        desk.ask(name, row)
    desk.engine.step()
    desk.engine.load("v2", new)
    with pytest.raises(InputError, match=rf"multiples of {size_multiple_px(new)} px.* found {odd.width_px}x16; ask"):
        desk.ask("refused", odd)
    desk.ask("after", even)
    desk.finish()
    ends = {name: desk.inbox.end_of(name) for name in ("at work", "waits", "moves", "after")}
    drawn = {name: end.version for name, end in ends.items() if isinstance(end, Done)}
    assert drawn == {"at work": "v1", "waits": "v1", "moves": "v2", "after": "v2"}, ends
    desk.engine.close()


def test_pictures_do_not_depend_on_the_default_precision_which_loading_a_model_changes_for_a_moment(
    desk: Desk, parts: Parts
) -> None:
    """diffusers and transformers set it for the whole process while they load a model in bf16."""
    row = picture(RED, seed=3, guidance_scale=3.3)
    expected = draw(parts, [row])[0]
    torch.set_default_dtype(torch.bfloat16)
    try:
        desk.ask("meanwhile", row)
        scale_B111 = desk.engine._requests["meanwhile"].prepared[0].scale_B111
        desk.finish()
        found = desk.inbox.pictures("meanwhile")[0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert difference(found, expected) <= 1
    assert scale_B111.item() == pytest.approx(3.3, rel=1e-6), "in bf16 it would be 3.297"


def test_swaps_under_load_lose_no_request(parts: Parts) -> None:
    """The loop runs in its thread, callers and swaps come from others."""
    desk = Desk(parts)
    desk.engine.start()
    for number in range(12):
        desk.ask(f"r{number}", picture(RED, seed=number, steps=3))
        if number % 3 == 2:
            desk.engine.load(f"v{number}", parts)
    for number in range(12):
        check_alike(desk.inbox.pictures(f"r{number}"), parts, picture(RED, seed=number, steps=3))
    desk.engine.close()
    assert sorted(desk.dropped) == ["v1", "v2", "v5", "v8"]
    assert desk.engine.counters.done == 12 and desk.engine.counters.failed == 0


def test_closing_finishes_what_was_accepted_and_refuses_more(parts: Parts) -> None:
    desk = Desk(parts)
    desk.engine.start()
    for number in range(4):
        desk.ask(f"r{number}", picture(seed=number))
    desk.engine.close()
    assert all(isinstance(desk.inbox.end_of(f"r{number}"), Done) for number in range(4))
    with pytest.raises(InputError, match="closing"):
        desk.ask("more", picture())


def test_a_fault_of_the_loop_fails_every_request_and_shows(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    desk = Desk(make("epsilon"))
    monkeypatch.setattr(desk.engine._loop, "change_rows", lambda now, requests: 1 / 0)
    desk.ask("r", picture())
    desk.engine.start()
    end = desk.inbox.end_of("r")
    assert isinstance(end, Failed) and isinstance(end.error, ZeroDivisionError)
    desk.engine.close()
    assert desk.engine.broken is end.error and "loop ended" in caplog.text
    with pytest.raises(InputError, match="closing"):
        desk.ask("more", picture())


def test_closing_without_draining_fails_what_is_left() -> None:
    desk = Desk(make("epsilon"))
    desk.ask("r", picture(steps=50))
    desk.engine.step()
    desk.engine.close(drain=False)
    end = desk.inbox.end_of("r")
    assert isinstance(end, Failed) and isinstance(end.error, InterruptedError)


def test_a_full_queue_refuses_with_the_backlog_in_numbers() -> None:
    desk = Desk(make("epsilon"), max_waiting_rows=3)
    desk.ask("a", picture(), picture())
    with pytest.raises(
        QueueFullError, match=r"room for 2 pictures, found 2 of 3 waiting \(4096 pixel-steps, at"
    ) as told:
        desk.ask("b", picture(), picture())
    assert told.value.retry_after_s is None, "nothing was measured yet"
    desk.engine.step()
    desk.engine.step()
    desk.ask("c", picture(), picture(), picture())
    with pytest.raises(QueueFullError, match=r"about \d+\.\d s") as told:
        desk.ask("d", picture())
    assert told.value.retry_after_s is not None and told.value.retry_after_s > 0
    assert desk.engine.counters.refused == 2
    desk.finish()
    assert all(isinstance(desk.inbox.end_of(name), Done) for name in "ac")
    desk.engine.close()


def test_deadlines_are_refused_early_by_the_measured_speed_and_kept_when_they_pass() -> None:
    now = 0.0
    desk = Desk(make("epsilon"))
    desk.engine._clock = lambda: now
    desk.ask("unknown speed", picture(), deadline_s=1e-9)
    desk.engine.step()
    desk.engine.step()
    with pytest.raises(DeadlineError, match=r"at least \d+\.\d\d at the measured speed \(.* waiting, .*\), found 0.00"):
        desk.ask("hopeless", picture(steps=50), deadline_s=1e-6)
    desk.ask("patient", picture(), deadline_s=1e6)
    now = 100.0
    desk.finish()
    end = desk.inbox.end_of("unknown speed")
    assert isinstance(end, Failed) and isinstance(end.error, DeadlineError)
    assert isinstance(desk.inbox.end_of("patient"), Done)
    assert desk.engine.counters.steps_saved == 2 and desk.engine.counters.refused == 1
    desk.engine.close()


def test_deadline_that_only_others_stand_in_the_way_of_says_when_to_come_again() -> None:
    desk = Desk(make("epsilon"), max_batch_rows=2)
    desk.ask("busy", picture(steps=500))
    desk.engine.step()
    desk.engine.step()
    desk.ask("waiting", picture(steps=500))
    with pytest.raises(DeadlineError, match="others are at work") as refused:
        # Four steps alone take a hundredth of the thousand that come before them.
        desk.ask("hurried", picture(), deadline_s=100 * (desk.engine._loop.times.seconds(None, 1) or 0))
    assert refused.value.retry_after_s is not None and refused.value.retry_after_s > 0
    desk.engine.cancel("busy")
    desk.engine.cancel("waiting")
    desk.engine.step()
    limit_s = 100 * (desk.engine._loop.times.seconds(None, 1) or 0)
    with pytest.raises(DeadlineError, match="ask again later"):  # it would do, had it not been held up before
        desk.ask("hurried", picture(), deadline_s=limit_s, waited_s=limit_s)
    desk.ask("hurried", picture(), deadline_s=limit_s)
    desk.engine.cancel("hurried")
    desk.engine.close()


def test_what_can_never_be_drawn_is_refused_at_once() -> None:
    desk = Desk(make("epsilon"), max_live_pixels=16 * 32)
    for words, ask in {
        "at least one picture": lambda: desk.ask("r"),
        "steps expected at least 1": lambda: desk.ask("r", picture(steps=0)),
        "priority expected a positive": lambda: desk.ask("r", picture(), priority=0.0),
        "solver expected one of ddim": lambda: desk.ask("r", picture(), solver="heun"),
        "at most 512 pixels": lambda: desk.ask("r", picture(width_px=32, height_px=32)),
        "version expected one of": lambda: desk.ask("r", picture(), version="v9"),
    }.items():
        with pytest.raises(InputError, match=words):
            ask()
    desk.ask("r", picture())
    with pytest.raises(InputError, match="found 'r' at work"):
        desk.ask("r", picture())
    assert desk.engine.status().versions == {"v1": 1}, "refused requests hold no weights"
    desk.finish()
    assert isinstance(desk.inbox.end_of("r"), Done)
    desk.engine.close()


def test_ended_requests_leave_nothing_behind(desk: Desk) -> None:
    kept = []
    for number in range(6):
        desk.ask(f"r{number}", picture(seed=number), partial_images=1)
        kept.append(weakref.ref(desk.engine._requests[f"r{number}"]))
        desk.engine.step()
    desk.engine.cancel("r5")
    desk.finish()
    for number in range(6):
        desk.inbox.end_of(f"r{number}")
    desk.engine.close()
    gc.collect()
    assert [request() for request in kept] == [None] * 6
    assert not desk.engine._loop._groups and not desk.engine._requests


def test_a_receiver_that_raises_disturbs_nobody(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    def broken(event: Event) -> None:
        raise ConnectionError("gone")

    desk.engine.submit(DrawRequest("broken", (picture(),), progress=True), broken)
    desk.ask("good", picture(seed=1))
    desk.finish()
    assert isinstance(desk.inbox.end_of("good"), Done)
    assert "broken" in caplog.text


def test_large_pictures_wait_for_memory_and_all_are_drawn() -> None:
    desk = Desk(make("epsilon"), max_live_pixels=32 * 32)
    for number in range(6):
        desk.ask(f"r{number}", picture(seed=number, width_px=32, height_px=32 if number == 1 else 16))
    live = []
    while desk.engine.step():
        live.append(sum(row.pixels for group in desk.engine._loop._groups.values() for row in group.rows))
    assert max(live) <= 32 * 32
    assert all(isinstance(desk.inbox.end_of(f"r{number}"), Done) for number in range(6))
    desk.engine.close()
