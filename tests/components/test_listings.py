"""Listings survive the disk, merge in order, and refuse what cannot be merged."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components import listings
from components.errors import DataError
from components.listings import Seen, merge, read_listing, union, write_listing

FILES = st.dictionaries(st.text("ab./é", min_size=1, max_size=4), st.sampled_from(["1", "2"]), max_size=8)


def rows(files: dict[str, str]) -> list[Seen]:
    return [Seen(uri, 1, etag) for uri, etag in sorted(files.items())]


def test_listing_read_back_is_what_was_written_whatever_its_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listings, "GROUP_ROWS", 7)
    files = [Seen(f"s3://b/{index:03}.png", index, f"e{index}", index / 8, "ab" * 32) for index in range(50)]
    digest, number = write_listing(tmp_path / "a.parquet", iter(files))
    assert number == 50
    assert list(read_listing(tmp_path / "a.parquet")) == files
    assert list(read_listing(tmp_path / "none.parquet")) == []
    other = [*files[:10], Seen(files[10].uri, 10, "changed"), *files[11:]]
    assert write_listing(tmp_path / "b.parquet", other)[0] != digest


def test_a_listing_out_of_order_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"in the order of names, found 'a' after 'b'"):
        write_listing(tmp_path / "a.parquet", [Seen("b", 1, ""), Seen("a", 1, "")])


def test_a_damaged_listing_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"a\.parquet expected to be a whole listing"):
        list(read_listing(tmp_path / "a.parquet"))


@given(FILES, FILES)
def test_merge_pairs_every_file_once_and_in_order(left: dict[str, str], right: dict[str, str]) -> None:
    paired = list(merge(rows(left), rows(right)))
    uris = [(one or other).uri for one, other in paired]  # type: ignore[union-attr]
    assert uris == sorted({*left, *right})
    assert {one.uri: one.etag for one, _ in paired if one} == left
    assert {other.uri: other.etag for _, other in paired if other} == right
    assert {row.uri: row.etag for row in union(rows(left), rows(right))} == {**left, **right}
