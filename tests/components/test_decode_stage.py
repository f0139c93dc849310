"""Decoding beside the loop: final pictures first, failures stay with their row, early pictures may be dropped."""

import threading
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from components.decode_stage import MAX_BATCH_PIXELS, MAX_WAITING_PARTIAL, DecodeJob, DecodeStage
from components.errors import NonFiniteError
from components.models import decode_latents, make_tiny
from components.sampler import to_images

LIMIT_S = 60.0


@pytest.fixture(scope="module")
def vae() -> Any:
    return make_tiny("stable_diffusion").vae


def latents(seed: int, side: int = 4) -> torch.Tensor:
    return torch.randn(4, side, side, generator=torch.Generator().manual_seed(seed))


class Held:
    """Holds the stage's thread inside one delivery until the test has queued what it wants."""

    def __init__(self, stage: DecodeStage, vae: Any) -> None:
        self.entered, self.released = threading.Event(), threading.Event()
        stage.put(DecodeJob(vae, latents(99), self._wait))
        assert self.entered.wait(LIMIT_S)

    def _wait(self, result: Any) -> None:
        self.entered.set()
        assert self.released.wait(LIMIT_S)


@pytest.mark.parametrize("strict", [False, True])
def test_pictures_of_mixed_sizes_are_each_rows_own(vae: Any, strict: bool) -> None:
    stage, found = DecodeStage(strict), {}
    held = Held(stage, vae)
    for seed in range(6):
        stage.put(
            DecodeJob(vae, latents(seed, 4 + 4 * (seed % 2)), lambda result, seed=seed: found.update({seed: result}))
        )
    held.released.set()
    stage.close()
    for seed in range(6):
        expected = to_images(decode_latents(vae, latents(seed, 4 + 4 * (seed % 2)).unsqueeze(0)))[0]
        assert isinstance(found[seed], Image.Image)
        difference = np.abs(np.asarray(found[seed]).astype(int) - np.asarray(expected).astype(int)).max()
        assert difference <= (0 if strict else 1)
    assert stage.picture_s > 0


def test_a_row_that_is_not_finite_or_cannot_be_decoded_fails_alone(vae: Any) -> None:
    stage, found = DecodeStage(), {}
    held = Held(stage, vae)

    def refuse(module: Any, args: Any) -> None:
        if bool((args[0].abs() > 1e6).any()):
            raise RuntimeError("out of range")

    hook = vae.decoder.register_forward_pre_hook(refuse)
    bad = {1: latents(1) * float("nan"), 2: latents(2) * 1e12}
    for seed in range(4):
        job = DecodeJob(vae, bad.get(seed, latents(seed)), lambda result, seed=seed: found.update({seed: result}))
        stage.put(job)
    held.released.set()
    stage.close()
    hook.remove()
    assert isinstance(found[1], NonFiniteError) and "latents" in str(found[1])
    assert str(found[2]) == "out of range"
    assert isinstance(found[0], Image.Image) and isinstance(found[3], Image.Image)


def test_final_pictures_pass_early_ones_and_too_many_early_ones_are_dropped(vae: Any) -> None:
    stage, order = DecodeStage(strict=True), []
    held = Held(stage, vae)
    for number in range(MAX_WAITING_PARTIAL + 3):
        stage.put(DecodeJob(vae, latents(number), lambda result, n=number: order.append(("early", n)), final=False))
    stage.put(DecodeJob(vae, latents(7), lambda result: order.append(("final", 0))))
    held.released.set()
    stage.close()
    assert order[0] == ("final", 0)
    assert order[1:] == [("early", number) for number in range(3, MAX_WAITING_PARTIAL + 3)]
    assert stage.num_dropped == 3


def test_rows_nobody_wants_any_more_are_not_decoded(vae: Any) -> None:
    stage, found = DecodeStage(), {}
    held = Held(stage, vae)
    wanted = {number: number != 1 for number in range(3)}
    for number in range(3):
        deliver = partial(found.__setitem__, number)
        stage.put(DecodeJob(vae, latents(number), deliver, wanted=lambda number=number: wanted[number]))
    wanted[2] = False
    held.released.set()
    stage.close()
    assert list(found) == [0]


def test_a_call_decodes_no_more_pixels_than_the_bound(vae: Any) -> None:
    stage, rows = DecodeStage(), []
    held = Held(stage, vae)
    hook = vae.decoder.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    for number in range(5):
        pixels = MAX_BATCH_PIXELS // 2 if number < 4 else 3 * MAX_BATCH_PIXELS
        stage.put(DecodeJob(vae, latents(number), lambda result: None, pixels=pixels))
    held.released.set()
    stage.close()
    hook.remove()
    assert rows == [2, 2, 1], "a picture above the bound is decoded alone"


def test_a_fault_of_the_stage_itself_is_told(vae: Any, caplog: pytest.LogCaptureFixture) -> None:
    faults: list[Exception] = []
    stage = DecodeStage(on_fault=faults.append)

    def broken(result: Any) -> None:
        raise KeyError("gone")

    stage.put(DecodeJob(vae, latents(1), broken))
    stage.close()
    assert [type(fault) for fault in faults] == [KeyError] and "decoding thread ended" in caplog.text


def test_the_first_batch_sets_the_speed_and_rows_in_hand_count_as_waiting(vae: Any) -> None:
    stage = DecodeStage()
    held = Held(stage, vae)
    first_s = stage.picture_s
    assert first_s == stage.decoding_s > 0, "one batch of one row so far"
    stage.put(DecodeJob(vae, latents(1), lambda result: None))
    assert stage.num_waiting == 2 and stage.expected_s(3) == pytest.approx(5 * first_s)
    held.released.set()
    stage.close()
    assert stage.num_waiting == 0
