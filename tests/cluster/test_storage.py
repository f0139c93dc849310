"""Folders and S3 buckets answer alike; the S3 side runs against a local server that speaks the protocol."""

import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from cluster import storage
from cluster.errors import StorageError


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "local":
        return str(tmp_path / "source")
    monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("s3_server"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = f"bucket-{uuid.uuid4().hex[:8]}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}/some/source"


def test_bytes_written_are_read_back_and_listed_with_their_size(root: str) -> None:
    storage.write_bytes_atomic(storage.join(root, "a/b.png"), b"12345")
    storage.write_bytes_atomic(storage.join(root, "ключ 1.txt"), b"")
    entries = storage.list_files(root)
    assert [(entry.uri.removeprefix(root + "/"), entry.size_bytes) for entry in entries] == [
        ("a/b.png", 5),
        ("ключ 1.txt", 0),
    ]
    assert storage.read_bytes(entries[0].uri) == b"12345"
    with storage.open_input(entries[0].uri) as file:
        file.seek(3)
        assert file.read() == b"45"


def test_list_files_keeps_wanted_suffixes_in_any_case_and_leaves_hidden_files_out(root: str) -> None:
    for name in ("a.PNG", "b.txt", ".hidden.png", ".git/c.png"):
        storage.write_bytes_atomic(storage.join(root, name), b"x")
    assert [entry.uri for entry in storage.list_files(root, suffixes=[".png"])] == [storage.join(root, "a.PNG")]


def test_list_files_does_not_list_a_sibling_whose_name_starts_alike(root: str) -> None:
    storage.write_bytes_atomic(root + "/a.png", b"x")
    storage.write_bytes_atomic(root + "-other/b.png", b"x")
    assert [entry.uri for entry in storage.list_files(root)] == [root + "/a.png"]
    assert [entry.uri for entry in storage.list_files(root + "/")] == [root + "/a.png"]


def test_etag_changes_when_the_content_does(root: str) -> None:
    uri = storage.join(root, "a.png")
    storage.write_bytes_atomic(uri, b"one")
    (before,) = storage.list_files(root)
    assert storage.list_files(root) == [before]
    storage.write_bytes_atomic(uri, b"two")
    (after,) = storage.list_files(root)
    assert after.size_bytes == before.size_bytes
    assert after.etag != before.etag


def test_what_is_not_there_does_not_exist_lists_empty_and_raises_file_not_found(root: str) -> None:
    assert not storage.exists(root)
    assert storage.list_files(root) == []
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(root, "a.png"))
    with pytest.raises(FileNotFoundError):
        storage.open_input(storage.join(root, "a.png"))
    storage.write_bytes_atomic(storage.join(root, "a.png"), b"x")
    assert storage.exists(root)
    assert storage.exists(storage.join(root, "a.png"))


def test_put_if_absent_lets_exactly_one_of_many_writers_win(root: str) -> None:
    uri = storage.join(root, "lease.json")
    won: list[int] = []
    writers = [
        threading.Thread(target=lambda who=who: won.append(who) if storage.put_if_absent(uri, b"%d" % who) else None)
        for who in range(8)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(won) == 1
    assert storage.read_bytes(uri) == b"%d" % won[0]
    assert len(storage.list_files(root)) == 1


def test_a_missing_bucket_does_not_exist(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    assert not storage.exists("s3://no-such-bucket/folder")
    with pytest.raises(StorageError, match="could not write s3://no-such-bucket/a"):
        storage.write_bytes_atomic("s3://no-such-bucket/a", b"x")


def test_a_link_out_of_the_folder_is_listed_as_outside_and_one_within_is_not(tmp_path: Path) -> None:
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    source.mkdir()
    elsewhere.mkdir()
    (source / "real.png").write_bytes(b"x")
    (elsewhere / "secret.png").write_bytes(b"x")
    (source / "within.png").symlink_to(source / "real.png")
    (source / "out.png").symlink_to(elsewhere / "secret.png")
    (source / "gone.png").symlink_to(source / "nothing.png")
    (source / "folder").symlink_to(elsewhere)
    outside = {Path(entry.uri).name: entry.outside for entry in storage.list_files(str(source))}
    assert outside == {"real.png": False, "within.png": False, "out.png": True, "folder": True}


def test_another_scheme_is_refused_with_the_ones_that_work() -> None:
    with pytest.raises(StorageError, match=r"expected a local path or s3://bucket/key, found 'gs://b/k'"):
        storage.read_bytes("gs://b/k")


def test_a_failed_local_write_leaves_the_old_content_and_no_other_file(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    target.mkdir()
    with pytest.raises(StorageError, match=r"could not write .*a\.json"):
        storage.write_bytes_atomic(str(target), b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
