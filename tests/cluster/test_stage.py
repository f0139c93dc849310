"""A workspace on S3: paths tell addresses, what is kept comes back as it was, and the stage may vanish at any time."""

import json
import shutil
import threading
from pathlib import Path

import pytest

from cluster import event_lines, s3, s3_files, stage, stage_names, storage, whole_folders
from cluster.artifacts import (
    append_journal,
    finished,
    open_workspace,
    read_journal,
    read_json,
    read_record,
    write_bytes_atomic,
    write_json_atomic,
    write_record,
)
from cluster.errors import PlacementError, StorageError
from tests.faults import FLIP, LOST_ANSWER, NOT_FOUND, RESET, SHORTEN, SLOW_DOWN, TRUNCATE, WRONG_CLOCK, Network, Rule
from tests.machines import Machines


@pytest.mark.parametrize("prefix", ["", "/a", "/a/b-c_d.e", "/with space", "/a+b=c/é@x"])
def test_a_path_of_a_stage_tells_its_address(
    prefix: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_names, "_folder", tmp_path)
    workspace = open_workspace(bucket + prefix)
    assert workspace.uri == bucket + prefix
    assert stage.address_of(workspace.run_dir("r") / "record.json") == f"{bucket}{prefix}/runs/r/record.json"
    assert workspace.place("locks", "x.lock") == f"{bucket}{prefix}/locks/x.lock"
    assert stage.address_of(workspace.root / "serving" / "serve.log") is None


def test_a_local_workspace_is_what_it_was(tmp_path: Path) -> None:
    workspace = open_workspace(str(tmp_path / "ws"))
    assert workspace.uri == str(workspace.root) and stage.address_of(workspace.root / "data") is None
    assert workspace.place("locks", "x") == str(workspace.root / "locks" / "x")
    write_json_atomic(workspace.root / "a.json", {})
    assert [path.name for path in workspace.root.iterdir()] == ["a.json"]


def test_paths_of_a_stage_are_addresses_in_what_other_machines_read_as_keys_too(machines: Machines) -> None:
    workspace = machines.be("first")
    pipeline = str(workspace.run_dir("r") / "pipeline")
    append_journal(workspace, "retire", versions=[1], deleted={pipeline: 5}, kept=[pipeline])
    (line,) = read_journal(machines.be("second"))
    address = f"{machines.uri}/runs/r/pipeline"
    assert (line["deleted"], line["kept"]) == ({address: 5}, [address])


def test_a_prefix_that_no_folder_can_be_named_after_is_refused(bucket: str) -> None:
    for prefix in ("x" * 250, "a/../b", "a//b"):
        with pytest.raises(PlacementError, match="workspace expected as s3://BUCKET/PREFIX"):
            open_workspace(f"{bucket}/{prefix}")


def test_a_record_brings_its_files_to_another_machine(machines: Machines) -> None:
    first = machines.be("first")
    directory = first.run_dir("emblems-1")
    write_bytes_atomic(directory / "manifest.parquet", b"rows")
    (directory / "samples").mkdir()
    (directory / "samples" / "plain.png").write_bytes(b"drawn without artifacts")
    (directory / "ray").mkdir()
    (directory / "ray" / "own.json").write_text("{}")
    assert read_record(directory) is None
    write_record(directory, {"n": 1})

    second = machines.be("second")
    directory = second.run_dir("emblems-1")
    assert finished(second.runs) == [directory]
    assert read_record(directory) == {"n": 1}
    assert (directory / "manifest.parquet").read_bytes() == b"rows"
    assert (directory / "samples" / "plain.png").read_bytes() == b"drawn without artifacts"
    assert not (directory / "ray").exists()


def test_what_another_machine_changed_is_seen_and_what_is_unchanged_is_not_fetched(
    machines: Machines, s3_network: Network
) -> None:
    path = machines.be("first").root / "endpoint.json"
    write_json_atomic(path, {"version": 1})
    other = machines.be("second").root / "endpoint.json"
    assert read_json(other) == {"version": 1}
    s3_network.plan()
    assert read_json(other) == {"version": 1}
    assert not [request for request in s3_network.seen if request.startswith("GET")]
    machines.be("first")
    write_json_atomic(path, {"version": 2})
    assert read_json(other) == {"version": 2}
    stage.remove(path)
    assert read_json(other) is None


def test_a_stage_may_be_deleted(machines: Machines) -> None:
    workspace = machines.be("only")
    write_bytes_atomic(workspace.run_dir("r") / "outcome.json", b"{}")
    write_record(workspace.run_dir("r"), {"n": 1})
    append_journal(workspace, "dataset", n=1)
    shutil.rmtree(workspace.root)
    assert read_record(workspace.run_dir("r")) == {"n": 1}
    assert (workspace.run_dir("r") / "outcome.json").is_file()
    shutil.rmtree(workspace.run_dir("r"))  # while what is remembered of it stays
    assert read_record(workspace.run_dir("r")) == {"n": 1}
    assert (workspace.run_dir("r") / "outcome.json").is_file()
    assert [line["event"] for line in read_journal(workspace)] == ["dataset"]


def test_a_write_that_fails_on_s3_leaves_nothing_to_be_believed(machines: Machines, s3_network: Network) -> None:
    workspace = machines.be("only")
    s3_network.plan(Rule(RESET, 100, "PUT"))
    with pytest.raises(StorageError, match="could not write s3://"):
        write_record(workspace.run_dir("r"), {"n": 1})
    s3_network.plan()
    assert read_record(workspace.run_dir("r")) is None and finished(workspace.runs) == []


@pytest.mark.parametrize("fault", [SLOW_DOWN, RESET, LOST_ANSWER, TRUNCATE, SHORTEN, FLIP])
def test_faults_of_the_network_change_nothing(fault: str, machines: Machines, s3_network: Network) -> None:
    content = bytes(range(256)) * 64
    first = machines.be("first")
    s3_network.plan(Rule(fault, 2, "PUT" if fault not in (TRUNCATE, SHORTEN, FLIP) else "GET /.*manifest"))
    write_bytes_atomic(first.dataset_dir("d@1") / "manifest.parquet", content)
    write_record(first.dataset_dir("d@1"), {"n": 1})
    append_journal(first, "dataset", n=1)
    second = machines.be("second")
    assert read_record(second.dataset_dir("d@1")) == {"n": 1}
    assert (second.dataset_dir("d@1") / "manifest.parquet").read_bytes() == content
    assert len(read_journal(second)) == 1
    assert s3_network.struck


def test_an_object_that_was_damaged_in_the_bucket_is_refused(machines: Machines) -> None:
    workspace = machines.be("first")
    path = workspace.root / "reports" / "page.html"
    write_bytes_atomic(path, b"as it was")
    address = str(stage.address_of(path))
    name, _, key = address.removeprefix("s3://").partition("/")
    metadata = s3.client().head_object(Bucket=name, Key=key)["Metadata"]
    s3.client().put_object(Bucket=name, Key=key, Body=b"as it is ", Metadata=metadata)
    with pytest.raises(StorageError, match="what came differs from what was uploaded"):
        stage.fetch(machines.be("second").root / "reports" / "page.html")


def test_a_404_that_is_not_s3s_own_takes_nothing_away_here(machines: Machines, s3_network: Network) -> None:
    workspace = machines.be("only")
    path = workspace.root / "reports" / "page.html"
    write_bytes_atomic(path, b"as it was")
    append_journal(workspace, "dataset")
    s3_network.plan(Rule(NOT_FOUND, 1000))
    for ask in (
        lambda: stage.fetch(path),
        lambda: stage.fetch_tree(path.parent),
        lambda: stage.changed_at(path),
        lambda: stage.folders(workspace.root),
        lambda: read_journal(workspace),
        lambda: read_record(path.parent),
    ):
        with pytest.raises(StorageError, match=r"404.*not S3 but something before it said so"):
            ask()
    assert path.read_bytes() == b"as it was"
    s3_network.plan(Rule(NOT_FOUND, 1, "HEAD"))
    assert stage.fetch(path) and s3_network.struck, "a HEAD alone proves nothing"
    assert not stage.fetch(path.with_name("none.html"))


def test_a_wrong_clock_is_named(machines: Machines, s3_network: Network) -> None:
    workspace = machines.be("only")
    s3_network.plan(Rule(WRONG_CLOCK, 100))
    with pytest.raises(StorageError, match=r"clock is 1\d{4} s ahead of the storage's"):
        append_journal(workspace, "dataset")


def test_a_bucket_that_is_not_there_and_credentials_that_are_refused_are_named(
    bucket: str, s3_network: Network, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(stage_names, "_folder", tmp_path)
    with pytest.raises(PlacementError, match=r"found 's3://no-such-bucket/x': there is no such bucket"):
        open_workspace("s3://no-such-bucket/x")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(PlacementError, match="no credentials of the usual AWS chain"):
        open_workspace(f"{bucket}/y")


def test_an_s3_workspace_has_no_database(machines: Machines) -> None:
    with pytest.raises(PlacementError, match=r"placement\.tracking_uri expected .*mlflow server"):
        machines.be("only").mlflow_uri  # noqa: B018 (looking raises)


def test_journal_lines_of_many_writers_are_all_there_once(machines: Machines, s3_network: Network) -> None:
    workspace = machines.be("only")
    lines = [f"PUT .*/0*{number}\\.json" for number in range(1, 32, 3)]
    s3_network.plan(*(Rule(fault, 1, line) for line in lines for fault in (SLOW_DOWN, LOST_ANSWER, RESET)))

    def write(name: str) -> None:
        for number in range(8):
            append_journal(workspace, "trigger", writer=name, number=number)

    writers = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    told = [(line["writer"], line["number"]) for line in read_journal(machines.be("second"))]
    assert sorted(told) == [(name, number) for name in "abcd" for number in range(8)]
    for name in "abcd":
        assert [number for writer, number in told if writer == name] == list(range(8))
    assert len(s3_network.struck) == 3 * len(lines)


def test_journal_order_needs_no_clock(machines: Machines) -> None:
    append_journal(machines.be("first"), "one")
    second = machines.be("second")
    with pytest.MonkeyPatch.context() as clock:
        clock.setattr("cluster.artifacts.time.gmtime", lambda *_: (1999, 1, 1, 0, 0, 0, 4, 1, 0))
        append_journal(second, "two")
    lines = event_lines.read(machines.be("third").journal)
    assert [line["event"] for line in lines] == ["one", "two"]
    assert lines[1]["time"] < lines[0]["time"]


def test_journal_lines_are_fetched_once(machines: Machines, s3_network: Network) -> None:
    workspace = machines.be("only")
    for number in range(5):
        append_journal(workspace, "trigger", number=number)
    assert len(read_journal(workspace)) == 5
    s3_network.plan()
    assert [line["number"] for line in read_journal(workspace)] == list(range(5))
    assert not [request for request in s3_network.seen if request.startswith("GET") and ".lines/0" in request]


def a_model(folder: Path, weights: bytes) -> Path:
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "unet" / "weights.safetensors").write_bytes(weights)
    return folder


def test_a_whole_folder_comes_back_whole_or_not_at_all(machines: Machines, s3_network: Network) -> None:
    first = machines.be("first")
    pipeline = a_model(first.run_dir("r") / "pipeline", b"weights")
    s3_network.plan(Rule(SLOW_DOWN, 100, "PUT .*weights"))
    with pytest.raises(StorageError):
        whole_folders.keep_whole(pipeline)
    second = machines.be("second").run_dir("r") / "pipeline"
    s3_network.plan()
    assert not whole_folders.fetch_whole(second) and not second.exists()
    whole_folders.keep_whole(pipeline)
    s3_network.plan(Rule(RESET, 100, "GET .*weights"))
    with pytest.raises(StorageError):
        whole_folders.fetch_whole(second)
    assert not second.exists()
    s3_network.plan(Rule(TRUNCATE, 1, "GET .*weights"))
    assert whole_folders.fetch_whole(second)
    assert (second / "unet" / "weights.safetensors").read_bytes() == b"weights"
    assert [path.name for path in second.parent.iterdir() if not path.name.startswith(".")] == ["pipeline"]


def test_a_replaced_folder_replaces_the_copy_and_a_damaged_copy_is_fetched_again(machines: Machines) -> None:
    first = machines.be("first").run_dir("r") / "pipeline"
    whole_folders.keep_whole(a_model(first, b"old"))
    second = machines.be("second").run_dir("r") / "pipeline"
    assert whole_folders.fetch_whole(second)
    shutil.rmtree(first)
    whole_folders.keep_whole(a_model(first, b"new"))
    assert whole_folders.fetch_whole(second)
    assert (second / "unet" / "weights.safetensors").read_bytes() == b"new"
    (second / "unet" / "weights.safetensors").unlink()
    assert whole_folders.fetch_whole(second)
    assert (second / "unet" / "weights.safetensors").read_bytes() == b"new"


def test_a_card_that_is_written_again_leaves_the_model_whole(machines: Machines) -> None:
    first = machines.be("first").run_dir("r") / "pipeline"
    whole_folders.keep_whole(a_model(first, b"weights"))
    for text in (b"version 1", b"version 1, promoted again"):
        write_bytes_atomic(first / "README.md", text)
        whole_folders.keep_whole(first)
    write_bytes_atomic(first / "README.md", b"rolled back to")
    second = machines.be("second").run_dir("r") / "pipeline"
    assert whole_folders.fetch_whole(second) and stage.fetch(second / "README.md")
    assert (second / "README.md").read_bytes() == b"rolled back to"


def test_a_folder_whose_list_disagrees_is_refused(machines: Machines) -> None:
    first = machines.be("first").run_dir("r") / "pipeline"
    whole_folders.keep_whole(a_model(first, b"promoted"))
    storage.write_bytes_atomic(f"{stage.address_of(first)}/unet/weights.safetensors", b"tampered")
    with pytest.raises(StorageError, match="found another content"):
        whole_folders.fetch_whole(machines.be("second").run_dir("r") / "pipeline")


def test_a_log_that_grew_here_is_not_replaced_by_its_older_copy(machines: Machines) -> None:
    path = machines.be("only").run_dir("r") / "metrics.jsonl"
    write_bytes_atomic(path, b'{"step": 0}\n')
    with path.open("a") as file:
        file.write(json.dumps({"step": 1}) + "\n")
    assert stage.fetch(path) and len(path.read_text().splitlines()) == 2
    stage.keep(path)
    machines.be("second")
    other = machines.be("second").run_dir("r") / "metrics.jsonl"
    assert stage.fetch(other) and len(other.read_text().splitlines()) == 2


def test_a_large_file_travels_in_parts_and_is_compared(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, s3_network: Network
) -> None:
    monkeypatch.setattr(s3_files, "IN_MEMORY_BYTES", 5 * 2**20)
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    content = bytes(range(251)) * 50_000
    path = machines.be("first").root / "big.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    s3_network.plan(Rule(RESET, 1, "PUT .*partNumber=2"))
    stage.keep(path)
    assert s3_network.struck == [RESET] and any("uploadId" in request for request in s3_network.seen)
    other = machines.be("second").root / "big.bin"
    s3_network.plan(Rule(FLIP, 1, "GET .*big.bin"))
    assert stage.fetch(other) and other.read_bytes() == content
    assert s3_network.struck == [FLIP]


def test_an_upload_in_parts_that_another_replaced_at_once_is_not_taken_for_what_is_there(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, s3_network: Network
) -> None:
    monkeypatch.setattr(s3_files, "IN_MEMORY_BYTES", 5 * 2**20)
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    path = machines.be("first").root / "big.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"ours" * 2**21)
    bucket, _, key = str(stage.address_of(path)).removeprefix("s3://").partition("/")

    def overtake(request: str) -> None:
        if request.startswith("HEAD"):
            s3_network.before_passing_on = None
            s3_files.upload(bucket, key, b"theirs")

    s3_network.before_passing_on = overtake
    stage.keep(path)
    assert s3_network.before_passing_on is None
    assert stage.fetch(path) and path.read_bytes() == b"theirs"
