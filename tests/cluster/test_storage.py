"""Folders and S3 buckets answer alike; the S3 side runs against a local server that speaks the protocol."""

import threading
from pathlib import Path

import pytest

from cluster import storage
from cluster.errors import BucketError, StorageError


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "source")
    return f"{request.getfixturevalue('bucket')}/some/source"


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


def test_of_many_replacers_of_one_content_exactly_one_wins(root: str) -> None:
    uri = storage.join(root, "record.json")
    storage.write_bytes_atomic(uri, b"first")
    _, tag = storage.read_tagged(uri)
    won: list[int] = []
    writers = [
        threading.Thread(target=lambda who=who: won.append(who) if storage.replace_if(uri, b"%d" % who, tag) else None)
        for who in range(8)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(won) == 1
    assert storage.read_bytes(uri) == b"%d" % won[0]
    assert [entry.uri for entry in storage.list_files(root)] == [uri]


def test_replacing_what_is_not_as_it_was_is_refused(root: str) -> None:
    uri = storage.join(root, "record.json")
    assert storage.replace_if(uri, b"one", None)
    assert not storage.replace_if(uri, b"two", None)
    _, tag = storage.read_tagged(uri)
    storage.delete(uri)
    storage.delete(uri)
    assert not storage.replace_if(uri, b"two", tag)
    assert not storage.exists(uri)


def test_a_change_that_another_process_never_ends_is_waited_for_up_to_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "record.json")
    storage.write_bytes_atomic(uri, b"one")
    _, tag = storage.read_tagged(uri)
    monkeypatch.setattr(storage, "GUARD_LIMIT_S", 0.2)
    with (
        storage._guard(Path(uri)),
        pytest.raises(StorageError, match=r"record\.json expected to be free for a change within 0 s, found another"),
    ):
        storage.replace_if(uri, b"two", tag)
    assert storage.replace_if(uri, b"two", tag)


def test_files_are_listed_in_the_order_of_their_whole_names(root: str) -> None:
    names = ["a.png", "a/b.png", "a/c/d.png", "a-b.png", "a0.png", "A.png", "é.png", "z/z.png"]
    for name in names:
        storage.write_bytes_atomic(storage.join(root, name), b"x")
    listed = [entry.uri.removeprefix(f"{root}/") for entry in storage.iter_files(root)]
    assert listed == sorted(names)


def test_a_missing_bucket_is_said_and_neither_an_empty_one_nor_written_to(bucket: str) -> None:
    with pytest.raises(
        BucketError, match=r"could not list s3://no-such-bucket/folder .*'no-such-bucket' does not exist"
    ):
        storage.exists("s3://no-such-bucket/folder")
    with pytest.raises(BucketError, match=r"could not write s3://no-such-bucket/a .*'no-such-bucket' does not exist"):
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
