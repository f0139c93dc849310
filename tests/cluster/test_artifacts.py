"""Whole files or none, records that mark completeness, and a journal that survives a crash."""

import multiprocessing
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.artifacts import (
    append_journal,
    open_workspace,
    read_journal,
    read_json,
    read_record,
    write_bytes_atomic,
    write_json_atomic,
    write_record,
)
from cluster.errors import PlacementError, StorageError

ROOT = Path(__file__).parents[2]


def test_workspace_is_made_and_says_where_things_are(tmp_path: Path) -> None:
    workspace = open_workspace(str(tmp_path / "a" / "b"))
    assert workspace.root.is_dir()
    assert workspace.dataset_dir("emblems@123456789abc") == workspace.root / "data" / "emblems@123456789abc"
    assert workspace.run_dir("fresco-1") == workspace.root / "runs" / "fresco-1"
    assert workspace.mlflow_uri == f"sqlite:///{workspace.root}/mlflow.db"


def test_workspace_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PlacementError, match=r"writable folder, found '.*/file/ws'"):
        open_workspace(str(tmp_path / "file" / "ws"))
    with pytest.raises(PlacementError, match=r"a folder or s3://BUCKET/PREFIX, found 'gs://bucket/prefix'"):
        open_workspace("gs://bucket/prefix")


def test_atomic_write_makes_folders_and_replaces_without_leftovers(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.bin"
    write_bytes_atomic(path, b"first")
    write_bytes_atomic(path, b"second")
    assert path.read_bytes() == b"second"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.bin"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_write_into_a_path_that_is_a_file_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"could not write .*/file/x\.json: .*MiB free there.*--workspace"):
        write_json_atomic(tmp_path / "file" / "x.json", {})


def _limit_file_size() -> None:
    # Beyond the limit a write fails like on a full disk, once the signal that would end the process is ignored.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


FILL_THE_DISK = """
import sys
from pathlib import Path
from cluster.artifacts import append_journal, open_workspace, write_bytes_atomic
from cluster.errors import StorageError
workspace = open_workspace(sys.argv[1])
for attempt in (
    lambda: write_bytes_atomic(workspace.root / "kept.bin", b"x" * 5000),
    lambda: append_journal(workspace, "event", text="y" * 5000),
):
    try:
        attempt()
        print("written")
    except StorageError as error:
        print(error)
"""


def test_full_disk_is_a_named_error_and_the_old_file_stays_whole(tmp_path: Path) -> None:
    workspace = open_workspace(str(tmp_path))
    write_bytes_atomic(tmp_path / "kept.bin", b"old")
    append_journal(workspace, "before")
    done = subprocess.run(
        [sys.executable, "-c", FILL_THE_DISK, str(tmp_path)],
        cwd=ROOT,
        preexec_fn=_limit_file_size,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all(line.startswith("could not write") and "MiB free" in line for line in lines), lines
    assert (tmp_path / "kept.bin").read_bytes() == b"old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["journal.jsonl", "kept.bin"]
    append_journal(workspace, "after")
    assert [event["event"] for event in read_journal(workspace)] == ["before", "after"]


def test_record_marks_a_directory_complete(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    assert read_record(tmp_path / "missing") is None
    write_record(tmp_path, {"b": 1, "a": "é"})
    assert read_record(tmp_path) == {"a": "é", "b": 1}
    assert (tmp_path / "record.json").read_text().index('"a"') < (tmp_path / "record.json").read_text().index('"b"')


def test_json_that_is_not_there_is_none(tmp_path: Path) -> None:
    assert read_json(tmp_path / "nothing.json") is None


def test_journal_keeps_order_and_numbers(tmp_path: Path) -> None:
    workspace = open_workspace(str(tmp_path))
    assert read_journal(workspace) == []
    returned = append_journal(workspace, "promote", version=1, reason="first — premier")
    append_journal(workspace, "promote", version=2)
    events = read_journal(workspace)
    assert events[0] == returned
    assert [(event["event"], event["version"]) for event in events] == [("promote", 1), ("promote", 2)]


@pytest.mark.parametrize("cut", [b'{"event": "half', b'{"event"', b"{", '{"event": "é'.encode()[:-1]])
def test_journal_line_cut_short_by_a_crash_is_skipped_and_costs_no_other(tmp_path: Path, cut: bytes) -> None:
    workspace = open_workspace(str(tmp_path))
    append_journal(workspace, "first")
    with workspace.journal.open("ab") as file:
        file.write(cut)
    assert [event["event"] for event in read_journal(workspace)] == ["first"]
    append_journal(workspace, "second")
    append_journal(workspace, "third")
    assert [event["event"] for event in read_journal(workspace)] == ["first", "second", "third"]


def test_journal_text_with_unusual_line_breaks_stays_one_event(tmp_path: Path) -> None:
    workspace = open_workspace(str(tmp_path))
    append_journal(workspace, "prompt", text="a\u2028b\u0085c\nd")
    assert [event["text"] for event in read_journal(workspace)] == ["a\u2028b\u0085c\nd"]


def _append_many(root: str, writer: int) -> None:
    for number in range(50):
        append_journal(open_workspace(root), "event", writer=writer, number=number, text="z" * 500)


def test_journal_of_concurrent_writers_never_interleaves(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork" if sys.platform == "darwin" else "spawn")
    processes = [context.Process(target=_append_many, args=(str(tmp_path), writer)) for writer in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    events = read_journal(open_workspace(str(tmp_path)))
    assert len(events) == 150
    for writer in range(3):
        assert [event["number"] for event in events if event["writer"] == writer] == list(range(50))
    assert (tmp_path / "journal.jsonl").stat().st_size > 150 * 500
