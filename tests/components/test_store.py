"""Shards appear whole or not at all, under a full disk and under SIGKILL; packed rows come back in the asked order."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from components.errors import DataError
from components.store import RowFile, ShardStore, whole_folder

ROOT = Path(__file__).parents[2]


def rows(*keys: str, size: int = 4) -> pa.Table:
    return pa.table({"key": list(keys), "value": [key * size for key in keys]})


def run_python(code: str, directory: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, str(directory)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_missing_store_is_empty(tmp_path: Path) -> None:
    assert ShardStore(tmp_path / "none").keys() == set()


def test_rows_come_back_by_key_from_whichever_shard_holds_them(tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    first, second = store.write(rows("a", "b")), store.write(rows("c", "b"))
    assert store.keys() == {"a", "b", "c"}
    found = [row for table in store.read(["c", "b"], ["value"]) for row in table.to_pylist()]
    assert sorted(found, key=lambda row: row["key"]) == [{"key": "b", "value": "bbbb"}, {"key": "c", "value": "cccc"}]
    assert store.index()["b"] == min(first, second)


def test_the_same_keys_are_the_same_shard(tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    assert store.write(rows("a", "b")) == store.write(rows("b", "a"))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    store.write(rows("a"))
    with pytest.raises(DataError, match=r"expected 3 entries, found 2 missing \(first x\)"):
        list(store.read(["x", "a", "y"], ["value"]))


def test_a_damaged_shard_is_named_with_what_to_do(tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    path = tmp_path / store.write(rows("a", "b"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(
        DataError, match=rf"{path.name} expected to be a whole shard, found it damaged.*delete that file"
    ):
        store.keys()


def test_a_full_disk_leaves_no_shard_and_keeps_the_earlier_ones(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
import pyarrow as pa
from components.store import ShardStore
store = ShardStore(Path(sys.argv[1]))
store.write(pa.table({"key": ["small"], "value": ["x"]}))
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    store.write(pa.table({"key": ["large"], "value": ["x" * 1_000_000]}))
except OSError as error:
    print("errno", error.errno)
"""
    process = run_python(code, tmp_path)
    output, errors = process.communicate(timeout=60)
    assert output == "errno 27\n", errors
    assert ShardStore(tmp_path).keys() == {"small"}
    assert len(list(tmp_path.iterdir())) == 1


def test_sigkill_loses_at_most_the_shard_in_the_making(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
import pyarrow as pa
from components.store import ShardStore
store = ShardStore(Path(sys.argv[1]))
for number in range(100_000):
    store.write(pa.table({"key": [str(number)], "value": ["x" * 100_000]}))
    print(number, flush=True)
"""
    process = run_python(code, tmp_path)
    assert process.stdout is not None
    told = [int(process.stdout.readline()) for _ in range(3)]
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate(timeout=60)
    told += [int(line) for line in rest.splitlines()]
    assert process.returncode == -signal.SIGKILL
    kept = ShardStore(tmp_path).keys()
    assert {str(number) for number in told} <= kept
    assert len(kept) <= len(told) + 1


def test_discard_removes_the_named_shards_and_an_empty_folder(tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "store")
    first, second = store.write(rows("a")), store.write(rows("b"))
    store.discard([first, "never-there.parquet"])
    assert store.keys() == {"b"}
    store.discard([second])
    assert not store.directory.exists()


def test_rows_written_in_any_order_are_mapped_in_place_and_the_rest_is_zero(tmp_path: Path) -> None:
    with RowFile(tmp_path / "a.npy", (3, 2, 2), "f4") as file:
        file.put(2, np.arange(4).reshape(2, 2))
        file.put(0, np.array([7.0]))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    np.testing.assert_array_equal(mapped, [[[7, 0], [0, 0]], [[0, 0], [0, 0]], [[0, 1], [2, 3]]])


def test_a_folder_appears_only_when_its_block_ends_well(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk"), whole_folder(tmp_path / "table") as folder:
        (folder / "half").write_text("x")
        raise OSError("disk")
    assert list(tmp_path.iterdir()) == []
    with whole_folder(tmp_path / "table") as folder:
        (folder / "whole").write_text("x")
    assert [path.name for path in tmp_path.rglob("*")] == ["table", "whole"]


def test_a_folder_that_another_process_made_meanwhile_is_kept(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "table") as folder:
        (folder / "mine").write_text("x")
        (tmp_path / "table").mkdir()
        (tmp_path / "table" / "theirs").write_text("x")
    assert [path.name for path in tmp_path.rglob("*")] == ["table", "theirs"]
