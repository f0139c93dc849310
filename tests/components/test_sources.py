"""Layouts read from listings and bytes held in memory: no folder, no bucket, no decoding."""

import io
import json
from collections.abc import Callable
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.errors import DataError, InputError
from components.sources import Candidate, Listed, find_candidates, parquet_rows, parse_emblems, place_inside


def candidates_of(files: dict[str, bytes], outside: tuple[str, ...] = ()) -> list[Candidate]:
    listing = [Listed(path) for path in files] + [Listed(path, outside=True) for path in outside]
    open_file: Callable[[str], BinaryIO] = lambda path: io.BytesIO(files[path])  # noqa: E731
    return find_candidates("SOURCE", listing, files.__getitem__, open_file)


def outcome(files: dict[str, bytes], outside: tuple[str, ...] = ()) -> dict[str, str | None]:
    """Name -> problem, else caption, else the path of the caption file."""
    return {one.name: one.problem or one.caption or one.caption_path for one in candidates_of(files, outside)}


def jsonl(*entries: dict) -> bytes:
    return "\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries).encode()


def parquet(columns: dict[str, pa.Array], rows_per_group: int = 2) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, row_group_size=rows_per_group)
    return buffer.getvalue()


def test_metadata_jsonl_pairs_files_with_captions_and_says_what_is_wrong_with_the_rest() -> None:
    files = {
        "metadata.jsonl": jsonl(
            {"file_name": "a.png", "text": "赤い丸\u2028 ❤️"},
            {"file_name": "sub/b.png", "caption": "by the other key"},
            {"file_name": "c.png"},
            {"file_name": "d.png", "text": " \t\u3000"},
            {"file_name": "gone.png", "text": "x"},
            {"file_name": "../up.png", "text": "x"},
            {"file_name": "/etc/passwd.png", "text": "x"},
            {"file_name": "linked.png", "text": "x"},
            {"file_name": "folder/e.png", "text": "x"},
            {"file_name": "./sub/../f.png", "text": "f"},
        ),
        **dict.fromkeys(("a.png", "sub/b.png", "c.png", "d.png", "f.png", "unnamed.png", "notes.md"), b""),
    }
    assert outcome(files, outside=("linked.png", "folder")) == {
        "a.png": "赤い丸\u2028 ❤️",
        "sub/b.png": "by the other key",
        "c.png": "no_caption",
        "d.png": "empty_caption",
        "gone.png": "missing_file",
        "../up.png": "path_outside_source",
        "/etc/passwd.png": "path_outside_source",
        "linked.png": "path_outside_source",
        "folder/e.png": "path_outside_source",
        "folder": "path_outside_source",
        "f.png": "f",
        "unnamed.png": "no_caption",
    }


def test_metadata_csv_reads_quoted_captions_and_a_byte_order_mark() -> None:
    text = '\ufefffile_name,text\na.png,"one, ""two""\nthree"\nb.png,\n'
    assert outcome({"metadata.csv": text.encode(), "a.png": b"", "b.png": b""}) == {
        "a.png": 'one, "two"\nthree',
        "b.png": "empty_caption",
    }


def test_each_folder_has_its_own_metadata_and_jsonl_wins_over_csv_beside_it() -> None:
    files = {
        "one/metadata.jsonl": jsonl({"file_name": "a.png", "text": "from jsonl"}),
        "one/metadata.csv": b"file_name,text\na.png,from csv\n",
        "two/metadata.csv": b"file_name,text\na.png,two\n",
        "one/a.png": b"",
        "two/a.png": b"",
    }
    assert outcome(files) == {"one/a.png": "from jsonl", "two/a.png": "two"}


def test_a_lone_surrogate_is_an_unreadable_caption_or_name_not_a_crash() -> None:
    lines = b'{"file_name": "a.png", "text": "half \\ud800"}\n{"file_name": "b\\ud800.png", "text": "x"}'
    files = {"metadata.jsonl": lines, "a.png": b"", "b\ud800.png": b""}
    assert outcome(files) == {"a.png": "unreadable_caption", "b\\ud800.png": "unreadable_name"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "x"}\n{"file_name": ', r"metadata\.jsonl line 2 expected"),
        ("metadata.jsonl", b'["a.png", "x"]', r"line 1 expected a JSON object"),
        (
            "metadata.jsonl",
            b'{"image": "a.png", "text": "x"}',
            r"expected file_name, .* found only \['image', 'text'\]",
        ),
        ("metadata.csv", b"image,text\na.png,x\n", r"metadata\.csv:2 expected file_name"),
        ("metadata.csv", b"file_name,text\na.png,caf\xe9\n", r"expected to be UTF-8 text"),
        ("data.parquet", b"not parquet at all", r"data\.parquet expected to be a Parquet file"),
    ],
)
def test_a_source_that_cannot_be_read_is_one_clear_error(name: str, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        candidates_of({name: content, "a.png": b""})


def test_caption_files_are_paired_by_name() -> None:
    files = dict.fromkeys(("a.png", "a.txt", "sub/b.JPG", "sub/b.txt", "c.webp", "readme.txt"), b"")
    assert outcome(files, outside=("out.png",)) == {
        "a.png": "a.txt",
        "sub/b.JPG": "sub/b.txt",
        "c.webp": "no_caption",
        "out.png": "path_outside_source",
    }


def test_a_caption_file_that_links_out_rejects_its_picture() -> None:
    assert outcome({"a.png": b"", "b.png": b"", "b.txt": b""}, outside=("a.txt",)) == {
        "a.png": "path_outside_source",
        "b.png": "b.txt",
    }


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "found an empty folder"),
        ({"notes.md": b""}, r"expected captioned pictures in 'SOURCE', found none"),
        ({"a.png": b"", "b.png": b""}, r"expected captions, found 2 pictures and no caption in 'SOURCE'; add metadata"),
    ],
)
def test_nothing_usable_is_refused_with_the_layouts_that_work(files: dict[str, bytes], message: str) -> None:
    with pytest.raises(InputError, match=message):
        candidates_of(files)


@pytest.mark.parametrize(
    ("image", "image_name", "caption_name"),
    [
        (pa.array([{"bytes": b"1", "path": "x"}, {"bytes": None, "path": "y"}, None]), "image", "text"),
        (pa.array([b"1", None, None], pa.binary()), "image_bytes", "caption"),
        (pa.array([b"1", None, None], pa.large_binary()), "image", "caption"),
    ],
)
def test_parquet_rows_hold_bytes_and_captions_in_the_hugging_face_layouts(
    image: pa.Array, image_name: str, caption_name: str
) -> None:
    content = parquet({"id": pa.array([7, 8, 9]), image_name: image, caption_name: pa.array([" a", "b", "c"])})
    groups = candidates_of({"train/0.parquet": content})
    assert [group.row_group for group in groups] == [0, 1]
    rows = [row for group in groups for row in parquet_rows(io.BytesIO(content), group.path, group.row_group)]
    assert [(one.name, one.caption, one.problem, data) for one, data in rows] == [
        ("train/0.parquet#0", " a", "", b"1"),
        ("train/0.parquet#1", "b", "missing_file", None),
        ("train/0.parquet#2", "c", "missing_file", None),
    ]


def test_parquet_captions_that_are_null_or_blank_are_counted() -> None:
    content = parquet({"image": pa.array([b"1", b"2"]), "text": pa.array([None, "  "])})
    assert [one.problem for one, _ in parquet_rows(io.BytesIO(content), "p", 0)] == ["no_caption", "empty_caption"]


def test_parquet_without_a_picture_column_lists_the_columns_there_are() -> None:
    with pytest.raises(InputError, match=r"found url: string, text: string$"):
        candidates_of({"a.parquet": parquet({"url": pa.array(["x"]), "text": pa.array(["y"])})})


def test_a_damaged_row_group_is_a_data_error_that_names_it() -> None:
    content = bytearray(parquet({"image": pa.array([b"12345678" * 50]), "text": pa.array(["x"])}))
    content[4:40] = b"\xff" * 36
    with pytest.raises(DataError, match="p expected to be whole, found row group 0 unreadable"):
        list(parquet_rows(io.BytesIO(bytes(content)), "p", 0))


@pytest.mark.parametrize(
    ("folder", "file_name", "expected"),
    [
        ("", "a.png", "a.png"),
        ("x", "../a.png", "a.png"),
        ("x", "../../a.png", None),
        ("", "x/../../a.png", None),
        ("", "..", None),
        ("", "..a.png", "..a.png"),
        ("", "/a.png", None),
        ("x", "s3://b/a.png", None),
    ],
)
def test_place_inside_never_leaves_the_source(folder: str, file_name: str, expected: str | None) -> None:
    assert place_inside(folder, file_name) == expected


def test_emblems_uri_is_read_with_its_defaults() -> None:
    emblems = parse_emblems("emblems://drifted?count=12&seed=5")
    assert (emblems.world, emblems.count, emblems.seed) == ("drifted", 12, 5)
    assert parse_emblems("emblems://base").count == 1000


@pytest.mark.parametrize(
    "uri", ["emblems://mars", "emblems://base?count=0", "emblems://base?seed=-1", "emblems://base?n=3"]
)
def test_a_wrong_emblems_uri_says_what_it_should_be(uri: str) -> None:
    with pytest.raises(InputError, match=r"expected emblems://WORLD\?count=N&seed=S with WORLD one of base, drifted"):
        parse_emblems(uri)
