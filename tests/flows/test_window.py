"""The sample is a function of the source as it is now, and only what may enter it is read."""

import hashlib
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster import storage
from cluster.artifacts import open_workspace
from components import examine
from components.arrivals import CHANGING
from components.dataset import DatasetVersion, Item
from components.encode import pixels_name
from components.examine import stored_sizes
from components.images import Limits, PictureError, decode, to_png
from components.reservoir import key_of, priorities
from components.store import ShardStore
from flows import arrivals, window
from flows.config import Config, load_config, with_overrides
from flows.reference import WAITED_FOR
from flows.window import Sampled, Window, take_window

SIZE, SEED = 20, 5
NOBODY = DatasetVersion("none", "0" * 12, Path("nowhere"), ())


def picture(number: int) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return to_png(Image.fromarray(noise))


def put(source: Path, numbers: range) -> None:
    source.mkdir(exist_ok=True)
    for number in numbers:
        (source / f"{number:03}.png").write_bytes(picture(number))
        (source / f"{number:03}.txt").write_text(f"caption {number}")


def config_of(tmp_path: Path, workspace: str = "workspace") -> Config:
    overrides = [f"data.source={tmp_path / 'source'}", "data.resolution_px=16", "monitor.settle_s=0"]
    return load_config(overrides=[*overrides, f"monitor.window={SIZE}"], workspace=str(tmp_path / workspace))


def taken(config: Config, state: dict[str, Any] | None = None) -> Window:
    return take_window(config, open_workspace(config.workspace), NOBODY, SEED, state or {}, at=1000.0)


def hashes(window: Window) -> list[str]:
    return [one.sha256 for one in window.sample]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many new files each look handed out."""
    numbers: list[int] = []
    look = arrivals.look

    def counting(*given: Any) -> Any:
        found = look(*given)
        numbers.append(len(found.new))
        return found

    monkeypatch.setattr(arrivals, "look", counting)
    return numbers


def test_sample_of_a_source_that_grew_is_that_of_one_look_and_few_files_are_read(
    tmp_path: Path, read: list[int]
) -> None:
    config = config_of(tmp_path)
    put(tmp_path / "source", range(150))
    first = taken(config)
    assert len(first.sample) == SIZE and first.new_images == 150
    assert read[0] < 90 and first.counts["unread"] == 150 - read[0]
    put(tmp_path / "source", range(150, 300))
    second = taken(config, first.state)
    assert second.new_images == 300 and read[1] < 60
    again = taken(config, second.state)
    assert read[2] == 0 and again.sample == second.sample
    assert hashes(taken(config_of(tmp_path, "another"))) == hashes(second)


def test_what_is_deleted_leaves_the_sample_and_what_had_been_passed_over_comes_back(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    put(tmp_path / "source", range(100))
    first = taken(config)
    for path in sorted((tmp_path / "source").iterdir())[:100]:
        path.unlink()
    second = taken(config, first.state)
    kept = {one.caption for one in first.sample if int(one.caption.split()[1]) >= 50}
    assert second.gone == SIZE - len(kept) > 0 and second.new_images == 50
    assert len(second.sample) == SIZE and kept <= {one.caption for one in second.sample}
    assert hashes(second) == hashes(taken(config_of(tmp_path, "another")))


def test_rows_of_parquet_files_are_arrivals_like_others(tmp_path: Path, read: list[int]) -> None:
    config = config_of(tmp_path)
    (tmp_path / "source").mkdir()

    def table(name: str, numbers: range) -> None:
        rows = [{"image": {"bytes": picture(number), "path": None}, "text": f"caption {number}"} for number in numbers]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "source" / name, row_group_size=10)

    table("a.parquet", range(30))
    first = taken(config)
    assert first.new_images == 30 and len(first.sample) == SIZE and read == [3]
    table("b.parquet", range(30, 60))
    second = taken(config, first.state)
    assert second.new_images == 60 and read == [3, 3]
    assert hashes(second) == hashes(taken(config_of(tmp_path, "another")))
    (tmp_path / "source" / "a.parquet").unlink()
    third = taken(config, second.state)
    assert third.new_images == 30 and {one.caption for one in third.sample} <= {f"caption {n}" for n in range(30, 60)}
    assert hashes(third) == hashes(taken(config_of(tmp_path, "a third")))


def one_shot(known: set[str], contents: list[bytes]) -> list[tuple[str, str]]:
    """(hash, reason) of the sample as it is said to be: of all rows, examined one and all."""
    found: dict[str, str] = {}
    for content in contents:
        sha256, reason = hashlib.sha256(content).hexdigest(), ""
        try:
            decode(content, Limits())
        except PictureError as error:
            reason = str(error)
        if reason not in WAITED_FOR and sha256 not in known:
            found[sha256] = reason
    hashes = list(found)
    order = np.argsort(priorities([key_of(sha256) for sha256 in hashes], SEED))
    return [(hashes[place], found[hashes[place]]) for place in order][:SIZE]


def test_a_sample_of_samples_is_that_of_all() -> None:
    generator = np.random.default_rng(3)
    # Rows have the key of their bytes, single files one of their names; some hold the same bytes
    names = [hashlib.sha256(bytes([number])).hexdigest() for number in generator.integers(0, 200, 400).tolist()]
    keys = [
        key_of(name) if row else int(key) for name, row, key in zip(names, [1, 1, 1, 0] * 100, range(400), strict=True)
    ]
    arrived = [Sampled(key, f"{place}", name) for place, (key, name) in enumerate(zip(keys, names, strict=True))]
    whole = window._sampled(SIZE, SEED, arrived)
    parts: tuple[Sampled, ...] = ()
    for first in range(0, 400, 30):
        parts = window._sampled(SIZE, SEED, [*parts, *arrived[first : first + 30]])
    assert parts == whole and len(whole) == SIZE
    ranks = priorities(keys, SEED)
    best = sorted(
        {name: min(rank for rank, other in zip(ranks, names, strict=True) if other == name) for name in names}.items(),
        key=lambda one: one[1],
    )
    assert [one.sha256 for one in whole] == [name for name, _ in best[:SIZE]]


def test_of_a_large_table_those_rows_alone_are_decoded_and_kept_that_may_enter_and_the_sample_is_that_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    held: list[int] = []
    decoding, sampling = examine.decode, window._sampled

    def counting(content: bytes, limits: Limits) -> Any:
        decoded.append(len(content))
        return decoding(content, limits)

    def holding(size: int, seed: int, some: list[Any]) -> Any:
        held.append(len(some))
        return sampling(size, seed, some)

    monkeypatch.setattr(examine, "decode", counting)
    monkeypatch.setattr(window, "_sampled", holding)
    source = tmp_path / "source"
    source.mkdir()
    known = [Item(hashlib.sha256(picture(number)).hexdigest(), "known", "train", "") for number in range(300)]
    contents = [picture(number) for number in range(400)]
    contents[51::8] = [bytes([number]) * 30 for number in range(44)]  # rejected, and as such in the sample
    contents[21] = contents[391] = b""  # waited for, as is what is cut short
    contents[13::25] = [content[:300] for content in contents[13::25]]
    rows = [
        {"image": {"bytes": content, "path": None}, "text": f"caption {place}"}
        for place, content in enumerate(contents)
    ]
    pq.write_table(pa.Table.from_pylist([*rows, *rows[100:150]]), source / "a.parquet", row_group_size=30)
    config = config_of(tmp_path)
    parents = {"nobody": NOBODY, "somebody": replace(NOBODY, items=tuple(known[::2]))}
    for name, parent in parents.items():
        workspace = open_workspace(str(tmp_path / name))
        decoded.clear(), held.clear()
        found = take_window(
            config.model_copy(update={"workspace": str(tmp_path / name)}), workspace, parent, SEED, {}, at=1000.0
        )
        expected = one_shot({item.sha256 for item in parent.items}, contents)
        assert [(one.sha256, one.reason) for one in found.sample] == expected, name
        assert any(reason for _, reason in expected) and all(one.reason or one.width_px for one in found.sample)
        assert len(decoded) < 180 and max(held) < 80, (len(decoded), held)
        stored = dict(stored_sizes(ShardStore(workspace.encoded / pixels_name(16))))
        assert {one.sha256 for one in found.pictures} <= set(stored) and len(stored) < 150


def test_a_file_that_came_to_rest_for_whoever_asks_has_come_to_rest(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    config = with_overrides(config, {"monitor.settle_s": 60.0})
    put(tmp_path / "source", range(30))
    loops = arrivals.look(config, NOBODY, None, 60.0, at=1000.0 - 60)
    workspace = open_workspace(config.workspace)
    assert taken(config).waiting == {CHANGING: 30}
    window = take_window(config, workspace, NOBODY, SEED, {}, 1000.0, loops.cursor)
    assert window.new_images == 30 and window.own == {}
    put(tmp_path / "source", range(30, 40))
    again = arrivals.look(config, NOBODY, loops.cursor, 60.0, at=1000.0)
    assert again.counts["new"] == 30, "the caller's listing is still there"


@pytest.mark.slow
def test_memory_of_a_look_does_not_grow_with_the_number_of_arrivals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "source").mkdir()

    def peak_bytes(num_pictures: int) -> int:
        """Of the Python objects of a look at pictures that the sample passes over, or that are gone when it reads."""

        def names(root: str) -> Iterator[storage.FileEntry]:
            for number in range(num_pictures):
                for suffix in ("png", "txt"):
                    yield storage.FileEntry(f"{root}/{number:07}.{suffix}", 9, "as-it-was")

        monkeypatch.setattr(storage, "iter_files", names)
        config = config_of(tmp_path, f"workspace-{num_pictures}")
        tracemalloc.start()
        try:
            window = taken(config)
            found = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert window.counts["unread"] > num_pictures - 300 and window.sample == ()
        return found

    peak_bytes(100)  # what is imported and cached once
    small, large = peak_bytes(10_000), peak_bytes(50_000)  # 20,000 and 100,000 names: each has its caption
    assert large < 1.3 * small + 500_000, (small, large)
