"""Capture: what was served is in shards, nothing waits for it, prompts stay out, the folder is bounded."""

import logging
import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster import capture
from cluster.capture import SCHEMA, Capture, Served, bytes_of, open_capture, read_captured, remove_oldest
from cluster.placement import ServeSection
from components.clip_encoder import ClipEncoder
from components.safety import EMBEDDED_CLIP

SECRET = "my secret wish"


class MeanColour:
    """An encoder by colour and length; it can be held up and made to fail."""

    identity = "mean-colour-1"

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.fail = False

    def images(self, pictures: list[Image.Image]) -> Any:
        return np.array([np.asarray(picture, np.float32).mean((0, 1)) for picture in pictures], np.float32)

    def texts(self, texts: list[str]) -> Any:
        assert self.gate.wait(30)
        if self.fail:
            raise RuntimeError(f"cannot read {texts[0]}")
        return np.array([[len(text), 1] for text in texts], np.float32)


def served(number: int, pictures: int = 1) -> Served:
    images = [Image.new("RGB", (4, 4), (number, index, 0)) for index in range(pictures)]
    return Served(f"req-{number}", "7", SECRET, images, 0.5, 1000.0 + number)


def make(folder: Path, encoder: MeanColour | None = None, **changed: Any) -> Capture:
    options = {"share": 1.0, "keep_prompts": False, "max_bytes": 10**9, **changed}
    return Capture(folder, encoder or MeanColour(), **options)


def test_every_picture_of_a_request_is_a_row(tmp_path: Path) -> None:
    kept = make(tmp_path)
    assert kept.offer(served(1)) and kept.offer(served(2, pictures=3))
    kept.close()
    table = read_captured(tmp_path)
    assert table.schema.equals(SCHEMA) and kept.counts == {"offered": 2, "dropped": 0, "written": 2, "failed": 0}
    rows = table.to_pylist()
    assert [(row["request_id"], row["image_index"]) for row in rows] == [
        *(("req-1", 0), ("req-2", 0), ("req-2", 1)),
        ("req-2", 2),
    ]
    assert rows[3]["image_features"] == [2, 2, 0] and rows[3]["prompt_features"] == [len(SECRET), 1]
    assert {(row["model_version"], row["encoder"], row["latency_s"]) for row in rows} == {("7", "mean-colour-1", 0.5)}
    assert read_captured(tmp_path, since_s=1002).num_rows == 3 and read_captured(tmp_path / "none").num_rows == 0


@pytest.mark.parametrize("keep", [False, True])
def test_prompt_is_text_only_where_that_is_allowed(tmp_path: Path, keep: bool) -> None:
    kept = make(tmp_path, keep_prompts=keep)
    kept.offer(served(1))
    kept.close()
    (shard,) = tmp_path.iterdir()
    assert read_captured(tmp_path)["prompt"].to_pylist() == [SECRET if keep else None]
    assert (SECRET.encode() in pq.read_table(shard).to_pandas().to_csv().encode()) == keep


def test_features_are_those_of_the_embedded_clip(tmp_path: Path) -> None:
    encoder = ClipEncoder(EMBEDDED_CLIP)
    kept = make(tmp_path, encoder)  # type: ignore[arg-type]
    kept.offer(served(1))
    kept.close(120)
    (row,) = read_captured(tmp_path).to_pylist()
    assert row["encoder"] == encoder.identity
    # Batched as here: one text, one picture; nothing rounds between.
    assert row["prompt_features"] == encoder.texts([SECRET])[0].tolist()
    assert row["image_features"] == encoder.images(list(served(1).pictures))[0].tolist()


def test_full_queue_drops_and_counts_by_the_bytes_of_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = MeanColour()
    encoder.gate.clear()
    monkeypatch.setattr(capture, "MOST_WAITING_BYTES", 70 * bytes_of(served(0)))
    kept = make(tmp_path, encoder)
    taken = [kept.offer(served(number % 250)) for number in range(500)]
    # What the thread took in its first batch is in memory too.
    assert sum(taken) == 70 and kept.counts["dropped"] == 430
    encoder.gate.set()
    kept.close()
    assert kept.counts["written"] == sum(taken) == read_captured(tmp_path).num_rows


def test_client_that_always_sends_the_same_name_is_kept_as_often_as_others(tmp_path: Path) -> None:
    kept = make(tmp_path, share=0.1, chance=random.Random(0).random)
    chosen = [kept.offer(served(1)) for _ in range(2000)]
    # Binomial: mean 200, standard deviation 13.4; five of those.
    assert abs(sum(chosen) - 200) < 67
    kept.close()


def test_picture_larger_than_the_bound_is_taken_when_none_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "MOST_WAITING_BYTES", 1)
    encoder = MeanColour()
    encoder.gate.clear()
    kept = make(tmp_path, encoder)
    assert kept.offer(served(1)) and not kept.offer(served(2))
    encoder.gate.set()
    wait_for(lambda: kept._waiting_bytes == 0)
    assert kept.offer(served(3))
    kept.close()
    assert kept.counts["written"] == 2


def test_what_is_outside_the_share_is_not_kept(tmp_path: Path) -> None:
    kept = make(tmp_path, share=1e-9)
    assert not kept.offer(served(1))
    kept.close()
    assert kept.counts["offered"] == 0 and list(tmp_path.iterdir()) == []


def test_encoder_that_fails_is_counted_and_tells_no_prompt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = MeanColour()
    encoder.fail = True
    kept = make(tmp_path, encoder)
    kept.offer(served(1))
    wait_for(lambda: kept.counts["failed"] == 1)
    encoder.fail = False
    kept.offer(served(2))
    kept.close()
    assert kept.counts["written"] == 1 and "could not be encoded: RuntimeError" in caplog.text
    assert SECRET not in caplog.text


def test_folder_that_cannot_be_written_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    (tmp_path / "file").write_text("")
    kept = make(tmp_path / "file")
    kept.offer(served(1))
    kept.close()
    assert kept.counts["failed"] == 1 and "could not be written" in caplog.text


def wait_for(condition: Any, limit_s: float = 20) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        threading.Event().wait(0.005)


def test_shards_are_written_while_it_runs_and_readers_see_only_whole_ones(tmp_path: Path) -> None:
    kept = make(tmp_path, flush_s=0.05)
    kept.offer(served(1))
    wait_for(lambda: kept.counts["written"] == 1)
    (tmp_path / ".20260101T000000-1-aa.parquet.half").write_bytes(b"PAR1")
    kept.offer(served(2))
    wait_for(lambda: kept.counts["written"] == 2)
    assert read_captured(tmp_path)["request_id"].to_pylist() == ["req-1", "req-2"]
    kept.close()


def test_oldest_shards_go_when_the_folder_is_above_its_bound(tmp_path: Path) -> None:
    names = [f"2026010{day}T000000-000000000-aaaaaaaa.parquet" for day in range(1, 6)]
    for name in names:
        (tmp_path / name).write_bytes(b"x" * 100)
    (tmp_path / "notes.txt").write_bytes(b"x" * 1000)
    remove_oldest(tmp_path, 250)
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names[3:], "notes.txt"]
    remove_oldest(tmp_path, 1)
    assert (tmp_path / names[4]).exists()
    kept = make(tmp_path, max_bytes=1, flush_s=0.05)
    for number in range(3):
        kept.offer(served(number))
        wait_for(lambda number=number: kept.counts["written"] == number + 1)
    kept.close()
    assert read_captured(tmp_path)["request_id"].to_pylist() == ["req-2"]


def test_config_says_how_much_is_kept(tmp_path: Path) -> None:
    assert open_capture(ServeSection(capture_share=0), tmp_path, MeanColour()) is None
    limits = ServeSection(capture_share=0.5, capture_prompts=True, capture_max_bytes=77)
    kept = open_capture(limits, tmp_path, MeanColour())
    assert kept is not None and (kept.share, kept.keep_prompts, kept.max_bytes) == (0.5, True, 77)
    kept.close()
