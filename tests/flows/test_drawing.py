"""Pictures of a scorecard: kept by what was asked, resumed by block, the same here and on Ray workers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cluster.artifacts import Workspace, open_workspace
from cluster.placement import PlacementSection
from components.errors import NonFiniteError
from components.models import SAMPLE_BATCH, load_parts, make_tiny, save_parts
from components.sampler import PictureRequest
from flows import drawing

PLACEMENT = PlacementSection(workers=2)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return open_workspace(str(tmp_path / "workspace"))


def requests(count: int, first_seed: int = 0) -> list[PictureRequest]:
    words = ("red circle", "blue square", "green ring")
    return [
        PictureRequest(f"a {words[i % 3]}", first_seed + i, steps=2, width_px=16, height_px=16) for i in range(count)
    ]


def arrays(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(picture, np.int16) for picture in pictures])


def drawn(workspace: Workspace, model: Path, wanted: list[PictureRequest]) -> np.ndarray:
    return arrays(drawing.ensure_drawn(PLACEMENT, workspace, model, "0123456789ab", wanted))


def no_loading(*_: Any, **__: Any) -> None:
    raise AssertionError("nothing should be drawn")


def test_pictures_are_drawn_once_for_the_same_weights_and_requests(workspace, tiny_base, monkeypatch, capsys):
    first = drawn(workspace, tiny_base, requests(5))
    assert "5 pictures to draw: in this process" in capsys.readouterr().err
    monkeypatch.setattr(drawing, "load_parts", no_loading)
    assert (drawn(workspace, tiny_base, requests(5)) == first).all()
    for other in (requests(4), requests(5, first_seed=9)):
        with pytest.raises(AssertionError, match="nothing should be drawn"):
            drawn(workspace, tiny_base, other)
    with pytest.raises(AssertionError, match="nothing should be drawn"):
        drawing.ensure_drawn(PLACEMENT, workspace, tiny_base, "another model", requests(5))


def test_a_killed_run_keeps_its_whole_blocks(workspace, tiny_base, monkeypatch):
    wanted = requests(SAMPLE_BATCH + 3)
    first = drawn(workspace, tiny_base, wanted)
    [folder] = (workspace.reports / "measured").iterdir()
    (folder / "record.json").unlink()
    (folder / drawing.picture_name(SAMPLE_BATCH + 1)).write_bytes(b"half")
    blocks: list[int] = []
    real = drawing.make_drawer

    def counting(job: drawing.DrawJob) -> Any:
        draw_block = real(job)
        return lambda block: (blocks.append(block.num_rows), draw_block(block))[1]

    monkeypatch.setattr(drawing, "make_drawer", counting)
    assert (drawn(workspace, tiny_base, wanted) == first).all()
    assert blocks == [3]  # the first block was whole


def test_broken_weights_leave_no_record(workspace, tmp_path):
    parts = make_tiny("stable_diffusion", seed=2)
    next(iter(parts.denoiser.parameters())).fill_(float("nan"))
    save_parts(parts, tmp_path / "broken")
    with pytest.raises(NonFiniteError, match="finite pixels"):
        drawn(workspace, tmp_path / "broken", requests(2))
    assert not list(workspace.reports.glob("measured/*/record.json"))


def test_workers_draw_the_same_pictures_as_this_process(
    ray_session, workspace, tiny_base, monkeypatch, tmp_path, capsys
):
    wanted = requests(2 * SAMPLE_BATCH + 5)
    here = drawn(workspace, tiny_base, wanted)
    monkeypatch.setattr(drawing, "HERE_UP_TO", SAMPLE_BATCH)
    monkeypatch.setattr(drawing, "load_parts", no_loading)  # in this process; workers import their own
    elsewhere = open_workspace(str(tmp_path / "elsewhere"))
    there = drawn(elsewhere, tiny_base, wanted)
    assert "dealt to 2 Ray workers" in capsys.readouterr().err
    # same blocks, other thread counts: sums in another order may round to the next of 255 levels
    assert np.abs(here - there).max() <= 1 and (here == there).mean() > 0.999


def test_a_workers_broken_weights_arrive_as_what_they_are(ray_session, workspace, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "HERE_UP_TO", 1)
    parts = make_tiny("stable_diffusion", seed=2)
    next(iter(parts.denoiser.parameters())).fill_(float("nan"))
    save_parts(parts, tmp_path / "broken")
    with pytest.raises(NonFiniteError, match="finite pixels"):
        drawn(workspace, tmp_path / "broken", requests(2))


def test_a_picture_does_not_depend_on_how_many_others_are_asked_for(workspace, tiny_base):
    """Whole blocks are equal to the bit; the rest of a block moves with its size by a rounding at most."""
    few, many = drawn(workspace, tiny_base, requests(5)), drawn(workspace, tiny_base, requests(9))
    assert np.abs(few - many[:5]).max() <= 1


def test_the_drawn_picture_is_the_samplers(workspace, tiny_base):
    from components.sampler import draw

    [picture] = draw(load_parts(tiny_base), requests(1))
    assert (drawn(workspace, tiny_base, requests(1))[0] == np.asarray(picture)).all()
