"""One worker's examination of candidates, on real bytes in a folder, without a cluster."""

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from components.dataset import Found
from components.examine import ExamineJob, candidate_blocks, make_examiner, read_found, stored_sizes
from components.images import Limits
from components.sources import Candidate
from components.store import ShardStore


@dataclass(frozen=True)
class Folder:
    root: Path

    def uri(self, name: str) -> str:
        return f"/source/{name}"

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def open_file(self, path: str) -> BinaryIO:
        return (self.root / path).open("rb")


def job_in(tmp_path: Path, source: str = "folder") -> ExamineJob:
    (tmp_path / "source").mkdir(exist_ok=True)
    return ExamineJob(source, Folder(tmp_path / "source"), Limits(), 16, tmp_path / "pixels")


def picture(red: int, size: tuple[int, int] = (20, 24)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (red, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def examine(job: ExamineJob, candidates: list[Candidate], rows: int = 256) -> dict[str, Found]:
    work = make_examiner(job)
    reports = [work(block) for block in candidate_blocks(candidates, rows)]
    return {one.uri: one for report in reports for one in read_found(report)}


def test_good_pictures_are_stored_and_bad_ones_counted(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    contents = {"good.png": picture(1), "zero.png": b"", "text.png": b"hello", "tiny.png": picture(2, (20, 5))}
    for name, content in contents.items():
        (tmp_path / "source" / name).write_bytes(content)
    found = examine(job, [Candidate(name, name, "  a caption\n") for name in (*contents, "gone.png")])
    assert {uri: one.reason for uri, one in found.items()} == {
        "/source/good.png": "",
        "/source/zero.png": "zero_bytes",
        "/source/text.png": "unreadable",
        "/source/tiny.png": "too_small",
        "/source/gone.png": "missing_file",
    }
    good = found["/source/good.png"]
    assert (good.caption, good.width_px, good.height_px) == ("a caption", 20, 24)
    assert stored_sizes(ShardStore(job.pixels)) == {good.sha256: (20, 24)}
    (table,) = ShardStore(job.pixels).read([good.sha256], ["png"])
    stored = Image.open(io.BytesIO(table["png"][0].as_py()))
    assert (stored.size, stored.getpixel((0, 0))) == ((16, 16), (1, 0, 0))


def test_captions_are_read_from_their_files(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    texts = {"a": "\ufeffГрафика ❤️ \n".encode(), "b": b" \n", "c": b"caf\xe9"}
    for index, (name, text) in enumerate(texts.items()):
        (tmp_path / "source" / f"{name}.png").write_bytes(picture(index))
        (tmp_path / "source" / f"{name}.txt").write_bytes(text)
    found = examine(job, [Candidate(f"{n}.png", f"{n}.png", caption_path=f"{n}.txt") for n in texts])
    assert [(one.caption, one.reason) for one in found.values()] == [
        ("Графика ❤️", ""),
        ("", "empty_caption"),
        ("", "unreadable_caption"),
    ]


def test_a_stored_picture_is_not_decoded_again_but_still_held_to_the_limits(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    (tmp_path / "source" / "a.png").write_bytes(picture(1))
    candidates = [Candidate("a.png", "a.png", "x")]
    first = examine(job, candidates)
    shards = sorted(job.pixels.iterdir())
    assert examine(job, candidates) == first
    assert sorted(job.pixels.iterdir()) == shards
    strict = replace(job, limits=Limits(min_side_px=21))
    assert examine(strict, candidates)["/source/a.png"].reason == "too_small"
    assert (
        examine(replace(job, limits=Limits(max_pixels=479)), candidates)["/source/a.png"].reason == "decompression_bomb"
    )


def test_a_failure_in_the_second_block_keeps_the_first_shard(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    for red in range(4):
        (tmp_path / "source" / f"{red}.png").write_bytes(picture(red))
    candidates = [Candidate(f"{red}.png", f"{red}.png", "x") for red in range(4)]
    work = make_examiner(job)
    first, second = candidate_blocks(candidates, rows=2)
    work(first)
    assert len(ShardStore(job.pixels).keys()) == 2
    report = make_examiner(job)(pa.concat_tables([first, second]))
    assert [bool(shard) for shard in report["shard"].to_pylist()] == [False, False, True, True]
    assert len(ShardStore(job.pixels).keys()) == 4


def test_parquet_row_groups_stand_for_their_rows(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    rows = [{"bytes": picture(red), "path": None} for red in range(3)]
    table = pa.table({"image": pa.array(rows), "text": ["a", "b", " "]})
    pq.write_table(table, tmp_path / "source" / "d.parquet", row_group_size=2)
    groups = [Candidate(f"d.parquet#{group}", "d.parquet", row_group=group) for group in range(2)]
    assert [len(block) for block in candidate_blocks([*groups, Candidate("a", "a")], 10)] == [1, 1, 1]
    found = examine(job, groups)
    assert {uri: (one.caption, one.reason) for uri, one in found.items()} == {
        "/source/d.parquet#0": ("a", ""),
        "/source/d.parquet#1": ("b", ""),
        "/source/d.parquet#2": ("", "empty_caption"),
    }


def test_built_in_examples_go_the_same_way(tmp_path: Path) -> None:
    job = job_in(tmp_path, "emblems://base?count=3&seed=1")
    found = examine(job, [Candidate(f"emblem#{index}", index=index) for index in range(3)])
    assert len({one.sha256 for one in found.values()}) == 3
    assert all(not one.reason and one.caption and one.width_px == 16 for one in found.values())
