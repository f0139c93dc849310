"""Splits, fingerprints and duplicates depend on content alone; the manifest and the card say what happened."""

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.dataset import (
    MANIFEST,
    SPLITS,
    Found,
    dataset_fingerprint,
    load_dataset,
    load_first_seen,
    make_card,
    make_manifest,
    manifest_bytes,
    rejection_table,
    resolve_duplicates,
    split_of,
)
from components.errors import InputError


def found(name: str, caption: str = "a caption", **fields: str) -> Found:
    return Found(f"/somewhere/{name}", caption, hashlib.sha256(name.encode()).hexdigest(), 64, 48, **fields)


PICTURES = [found(f"{index}.png", f"caption {index}") for index in range(400)]


def test_split_shares_come_out_near_the_fractions() -> None:
    counts = {split: sum(split_of(one.sha256, 0.1, 0.2) == split for one in PICTURES) for split in SPLITS}
    # 4 standard deviations of a binomial with n = 400.
    assert abs(counts["validation"] - 40) < 24
    assert abs(counts["test"] - 80) < 32
    assert sum(counts.values()) == 400


def test_a_picture_keeps_its_split_when_data_is_added() -> None:
    first = make_manifest(PICTURES[:100], (0.1, 0.1), "s", {}, "now").to_pylist()
    grown = make_manifest(PICTURES, (0.1, 0.1), "s", {}, "now").to_pylist()
    split = {row["sha256"]: row["split"] for row in grown}
    assert all(split[row["sha256"]] == row["split"] for row in first)


@pytest.mark.parametrize(("sha256", "expected"), [("0" * 64, "validation"), ("2" * 64, "test"), ("f" * 64, "train")])
def test_split_is_decided_by_the_first_digits(sha256: str, expected: str) -> None:
    assert split_of(sha256, 0.1, 0.1) == expected


@given(st.permutations(range(12)))
def test_fingerprint_does_not_depend_on_order_or_location(order: list[int]) -> None:
    moved = [Found(f"/elsewhere/{i}", PICTURES[i].caption, PICTURES[i].sha256, 1, 1) for i in order]
    assert dataset_fingerprint(moved, 64, 0.1, 0.1) == dataset_fingerprint(PICTURES[:12], 64, 0.1, 0.1)


def test_fingerprint_changes_with_every_thing_that_matters() -> None:
    one = PICTURES[:3]
    renamed_caption = [*one[:2], found("2.png", "another caption")]
    prints = {
        dataset_fingerprint(one, 64, 0.1, 0.1),
        dataset_fingerprint(one[:2], 64, 0.1, 0.1),
        dataset_fingerprint(renamed_caption, 64, 0.1, 0.1),
        dataset_fingerprint(one, 128, 0.1, 0.1),
        dataset_fingerprint(one, 64, 0.2, 0.1),
        dataset_fingerprint(one, 64, 0.1, 0.2),
    }
    assert len(prints) == 6


@given(st.permutations(["b", "a", "c"]), st.booleans())
def test_duplicates_keep_the_smallest_caption_in_any_order(captions: list[str], reverse: bool) -> None:
    same = [Found(f"/x/{caption}.png", caption, "ab" * 32, 64, 64) for caption in captions]
    other = [found("other.png"), Found("/x/bad.png", "", reason="unreadable")]
    accepted, rejected = resolve_duplicates([*other, *same] if reverse else [*same, *other])
    assert sorted(one.caption for one in accepted) == ["a", "a caption"]
    assert [(one.uri, one.reason) for one in rejected] == [
        ("/x/b.png", "duplicate_bytes"),
        ("/x/bad.png", "unreadable"),
        ("/x/c.png", "duplicate_bytes"),
    ]


def test_a_rejected_copy_does_not_displace_a_good_one() -> None:
    good = found("a.png", "z")
    accepted, _ = resolve_duplicates([Found("/x/a.png", "", good.sha256, reason="empty_caption"), good])
    assert accepted == [good]


def test_manifest_is_read_back_as_a_dataset_version_sorted_by_hash(tmp_path: Path) -> None:
    directory = tmp_path / "owls@night@0123456789ab"
    directory.mkdir()
    manifest = make_manifest(PICTURES, (0.1, 0.1), "s3://b/p", {}, "2026-01-02T00:00:00Z")
    (directory / MANIFEST).write_bytes(manifest_bytes(manifest))
    dataset = load_dataset(directory)
    assert (dataset.name, dataset.fingerprint, dataset.id) == ("owls@night", "0123456789ab", "owls@night@0123456789ab")
    assert sum(len(dataset.split(split)) for split in SPLITS) == 400
    train = [item.sha256 for item in dataset.split("train")]
    assert train == sorted(train)
    assert {item.caption for item in dataset.items} == {one.caption for one in PICTURES}


def test_first_seen_is_kept_from_the_earliest_version(tmp_path: Path) -> None:
    paths = []
    for day, pictures in (("2026-01-01", PICTURES[:2]), ("2026-01-02", PICTURES[:3])):
        paths.append(tmp_path / f"{day}.parquet")
        seen = load_first_seen(paths[:-1])
        paths[-1].write_bytes(manifest_bytes(make_manifest(pictures, (0.1, 0.1), "s", seen, day)))
    seen = load_first_seen(paths)
    assert [seen[one.sha256] for one in PICTURES[:3]] == ["2026-01-01", "2026-01-01", "2026-01-02"]


def test_card_counts_and_lists_what_was_left_out() -> None:
    rejected = [
        Found("/x/1", reason="no_caption"),
        Found("/x/2", reason="no_caption"),
        Found("/x/3", reason="truncated"),
    ]
    card = make_card("n@fp", "/x", make_manifest(PICTURES[:4], (0.1, 0.1), "/x", {}, "t"), rejected, "t")
    assert card["images"] == sum(card["splits"].values()) == 4
    assert card["rejected"] == {"no_caption": 2, "truncated": 1}
    assert card["rejected_items"][2] == {"uri": "/x/3", "reason": "truncated"}
    assert card["captions"] == {"count": 4, "distinct": 4, "mean_words": 2.0, "truncated": {}}
    assert "2  no_caption" in rejection_table(rejected, 7)
    assert "3  of 7 candidates rejected" in rejection_table(rejected, 7)


def test_a_folder_without_a_manifest_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a dataset version with manifest\.parquet .* run `fresco prepare`"):
        load_dataset(tmp_path)
