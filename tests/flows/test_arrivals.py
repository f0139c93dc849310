"""A source that grows while it is looked at, in a folder and in a bucket, and the versions that grow with it."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster import artifacts, storage
from cluster.errors import StorageError
from cluster.fencing import write_fenced
from components import arrivals as rules
from components.arrivals import Arrivals
from components.dataset import SPLITS, DatasetVersion
from components.errors import DataError, InputError
from components.images import to_png
from components.listings import LISTING
from flows import prepare
from flows.arrivals import PLACE, look
from flows.config import Config, load_config
from flows.grow import grow
from flows.ledger import state_uri
from flows.snapshot import key_of
from tests.faults import RESET, SHORTEN, SLOW_DOWN, TRUNCATE, Network, Rule

pytestmark = pytest.mark.usefixtures("examined_here")
SETTLE_S = 10.0


@pytest.fixture(params=["disk", "s3"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path / "source")
    return f"{request.getfixturevalue('bucket')}/source"


def picture(index: int) -> bytes:
    noise = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    return to_png(Image.fromarray(noise))


def put(source: str, index: int, name: str = "") -> None:
    name = name or f"{index:03}"
    storage.write_bytes_atomic(f"{source}/{name}.png", picture(index))
    storage.write_bytes_atomic(f"{source}/{name}.txt", f"caption {index}".encode())


def config_of(tmp_path: Path, source: str, **data: Any) -> Config:
    overrides = [f"data.source={source}", "data.resolution_px=16", "data.validation_fraction=0.2"]
    overrides += [f"data.{key}={value}" for key, value in data.items()]
    return load_config(overrides=overrides, workspace=str(tmp_path / "workspace"))


def made(config: Config, source: str, numbers: range = range(20)) -> DatasetVersion:
    for index in numbers:
        put(source, index)
    return prepare.ensure_dataset(config)


def looked_twice(
    config: Config, parent: DatasetVersion, cursor: dict[str, Any] | None = None, at: float = 1000
) -> Arrivals:
    first = look(config, parent, cursor, SETTLE_S, at=at)
    return look(config, parent, json.loads(json.dumps(first.cursor)), SETTLE_S, at=at + SETTLE_S)


def names(found: Any) -> list[str]:
    return [one.candidate.name for one in found]


def waiting(found: Arrivals) -> dict[str, str]:
    return {one.uri.rpartition("/")[2]: one.reason for one in found.pending}


def test_what_the_version_was_made_of_is_no_arrival(tmp_path: Path, source: str) -> None:
    config = config_of(tmp_path, source)
    parent = made(config, source)
    found = looked_twice(config, parent)
    assert set(found.counts.values()) == {0}
    assert (found.cursor["parent"], found.cursor["files"]) == (parent.id, 40)
    assert len(json.dumps(found.cursor)) < 1000


def test_a_picture_arrives_once_it_rests_with_its_caption_wherever_its_name_falls(tmp_path: Path, source: str) -> None:
    config = config_of(tmp_path, source)
    parent = made(config, source)
    put(source, 100)
    put(source, 101, "000-late")  # before most names that are held
    storage.write_bytes_atomic(f"{source}/alone.png", picture(102))
    storage.write_bytes_atomic(f"{source}/words.txt", b"no picture")
    storage.write_bytes_atomic(f"{source}/zero.png", b"")
    storage.write_bytes_atomic(f"{source}/zero.txt", b"x")
    first = look(config, parent, None, SETTLE_S, at=1000)
    assert not first.new
    assert waiting(first) == {
        **dict.fromkeys(("100.png", "000-late.png", "alone.png", "words.txt"), rules.CHANGING),
        "zero.png": rules.EMPTY,
    }
    early = look(config, parent, first.cursor, SETTLE_S, at=1000 + SETTLE_S - 1)
    assert not early.new
    storage.write_bytes_atomic(f"{source}/100.txt", b"written on")
    second = look(config, parent, early.cursor, SETTLE_S, at=1000 + SETTLE_S)
    assert names(second.new) == ["000-late.png"]
    assert waiting(second) == {
        "100.txt": rules.CHANGING,
        "alone.png": rules.NO_CAPTION_YET,
        "words.txt": rules.NO_PICTURE_YET,
        "zero.png": rules.EMPTY,
    }
    third = look(config, parent, second.cursor, SETTLE_S, at=1000 + 2 * SETTLE_S)
    assert names(third.new) == ["000-late.png", "100.png"]
    assert third.counts["new"] == third.num_pictures == 2


def test_a_half_written_picture_that_rests_is_pending_and_arrives_when_it_is_whole(tmp_path: Path, source: str) -> None:
    config = config_of(tmp_path, source)
    parent = made(config, source)
    put(source, 100)
    storage.write_bytes_atomic(f"{source}/100.png", picture(100)[:600])
    half = looked_twice(config, parent)
    assert not half.new and waiting(half) == {"100.png": rules.DAMAGED}
    put(source, 100)
    assert names(looked_twice(config, parent, half.cursor, at=2000).new) == ["100.png"]


def test_repeated_bytes_and_missing_files_are_reported_and_change_no_dataset(tmp_path: Path, source: str) -> None:
    config = config_of(tmp_path, source)
    parent = made(config, source)
    put(source, 3, "copy-of-3")
    put(source, 100)
    put(source, 100, "twin-of-100")
    storage.write_bytes_atomic(f"{source}/004.txt", b"another caption")
    storage.delete(f"{source}/005.png")
    storage.delete(f"{source}/005.txt")
    found = looked_twice(config, parent)
    assert names(found.new) == ["100.png"]
    assert names(found.repeated) == ["004.png", "copy-of-3.png", "twin-of-100.png"]
    gone = [uri.rpartition("/")[2] for uri in found.missing]
    assert gone == ["004.txt", "005.png", "005.txt"]
    child = grow(config, parent, found)
    assert {item.sha256 for item in parent.items} < {item.sha256 for item in child.items}
    assert "caption 4" in {item.caption for item in child.items}, "a dataset keeps the caption it trained with"
    card = artifacts.read_json(child.directory / "card.json")
    assert card["parent"] == artifacts.read_record(child.directory)["parent"] == parent.id  # type: ignore[index]
    assert card["arrivals"] == {"new": 1, "repeated": 3, "missing": 3, "pending": 0, "later": 0}
    again = looked_twice(config, child, found.cursor, at=3000)
    assert (again.counts["new"], again.counts["repeated"]) == (0, 0)
    assert [uri.rpartition("/")[2] for uri in again.missing] == ["005.png", "005.txt"], "still gone, still kept"


def test_a_lost_cursor_costs_one_look_and_a_cursor_of_another_source_counts_as_lost(
    tmp_path: Path, source: str
) -> None:
    config = config_of(tmp_path, source)
    parent = made(config, source)
    put(source, 100)
    found = look(config, parent, None, SETTLE_S, at=1000)
    for cursor in (None, {**found.cursor, "source": "s3://elsewhere"}, {**found.cursor, "listing": "0" * 24}):
        assert names(look(config, parent, cursor, SETTLE_S, at=2000).new) == []
    assert names(look(config, parent, look(config, parent, None, SETTLE_S, at=2000).cursor, SETTLE_S, at=3000).new)


def test_looks_that_nobody_saved_leave_the_listing_where_a_killed_loop_goes_on(tmp_path: Path, source: str) -> None:
    """The loop looks, the monitor or the patient loop looks once more, and the process dies before it saves."""
    config = config_of(tmp_path, source)
    parent = made(config, source)
    workspace = artifacts.open_workspace(config.workspace)
    put(source, 100)
    saved = look(config, parent, None, SETTLE_S, at=1000).cursor
    write_fenced(state_uri(workspace), {"cursor": saved}, 1)
    cursor = saved
    for turn in range(4):
        put(source, 101 + turn)
        cursor = look(config, parent, cursor, SETTLE_S, at=1001 + turn).cursor
    assert names(look(config, parent, saved, SETTLE_S, at=1000 + SETTLE_S).new) == ["100.png"]
    assert len(list((workspace.root / PLACE).rglob("*.parquet"))) == 2, "what no cursor names is cleared away"


def test_more_than_a_look_may_read_comes_in_the_looks_after_it(tmp_path: Path, source: str) -> None:
    config = config_of(tmp_path, source)
    parent = made(config, source)
    for index in range(100, 107):
        put(source, index)
    for index in range(4):
        put(source, index, f"050-copy-{index}")
    cursor, arrived, later = look(config, parent, None, SETTLE_S, limit=3, at=1000).cursor, set(), []
    for turn in range(1, 5):
        found = look(config, parent, cursor, SETTLE_S, limit=3, at=1000 + turn * SETTLE_S)
        cursor = found.cursor
        later.append(found.counts["later"])
        if found.new:
            parent = grow(config, parent, found)
        arrived |= set(names(found.new))
    assert later == [8, 5, 2, 0]
    assert len(arrived) == 7 and len(parent.items) == 27


def test_what_a_refused_attempt_had_takes_no_place_from_what_nobody_tried(tmp_path: Path, source: str) -> None:
    config = config_of(tmp_path, source)
    parent = made(config, source)
    for index in range(100, 105):
        put(source, index)
    cursor = look(config, parent, None, SETTLE_S, limit=3, at=1000).cursor
    first = look(config, parent, cursor, SETTLE_S, limit=3, at=1000 + SETTLE_S)
    had = {key_of(one) for one in first.new}
    again = look(config, parent, first.cursor, SETTLE_S, limit=3, at=1100, refused=had)
    assert names(again.new) == ["103.png", "104.png", "100.png"], "those come first, the others fill what is left"
    kinds = ("new", "refused", "later", "unsure")
    assert [again.counts[kind] for kind in kinds] == [2, 3, 0, 0]
    had |= {key_of(one) for one in again.new}
    put(source, 90)
    last = looked_twice_with(config, parent, again.cursor, had)
    assert names(last.new) == ["090.png", "100.png", "101.png"]
    assert [last.counts[kind] for kind in kinds] == [1, 5, 0, 0]
    lost = look(config, parent, {**cursor, "listing": "0" * 24}, 0.0, limit=3, at=1300, refused=had)
    assert [lost.counts[kind] for kind in kinds] == [1, 2, 3, 3], "unread, any of those for later may be a refused one"
    assert len(had) == 5, "the caller's set stays whole"


def looked_twice_with(
    config: Config, parent: DatasetVersion, cursor: dict[str, Any] | None, refused: set[str]
) -> Arrivals:
    first = look(config, parent, cursor, SETTLE_S, limit=3, at=1200, refused=refused)
    return look(config, parent, first.cursor, SETTLE_S, limit=3, at=1200 + SETTLE_S, refused=refused)


def test_growth_moves_no_picture_between_splits_also_when_fractions_change(tmp_path: Path, source: str) -> None:
    config = config_of(tmp_path, source)
    versions = [made(config, source)]
    cursor = None
    for turn in range(3):
        grown = config_of(tmp_path, source, validation_fraction=0.4, test_fraction=0.05 + 0.1 * turn)
        for index in range(100 + 20 * turn, 120 + 20 * turn):
            put(source, index)
        found = looked_twice(grown, versions[-1], cursor, at=1000 * (turn + 1))
        cursor = found.cursor
        assert found.counts["new"] == 20
        versions.append(grow(grown, versions[-1], found))
    for older, newer in itertools.pairwise(versions):
        split = {item.sha256: (item.split, item.caption, item.uri) for item in newer.items}
        assert all(split[item.sha256] == (item.split, item.caption, item.uri) for item in older.items)
        assert len(newer.items) == len(older.items) + 20
    assert {item.split for item in versions[-1].items} == set(SPLITS)
    assert len({version.id for version in versions}) == 4


def test_the_same_growth_is_the_same_version_and_other_parents_make_others(tmp_path: Path, source: str) -> None:
    config = config_of(tmp_path, source)
    parent = made(config, source)
    put(source, 100)
    found = looked_twice(config, parent)
    child = grow(config, parent, found)
    assert grow(config, parent, found).id == child.id
    assert grow(config, child, found) is child, "nothing in it is new to the child"
    fresh = prepare.ensure_dataset(config)
    assert {item.sha256 for item in fresh.items} == {item.sha256 for item in child.items}
    assert fresh.id != child.id, "a version with a parent is another version"
    named = config_of(tmp_path, source, version=child.id)
    assert prepare.ensure_dataset(named).id == prepare.find_dataset(named).id == child.id  # type: ignore[union-attr]
    with pytest.raises(InputError, match=rf"data\.resolution_px expected to be 16 as in data.version {child.id}"):
        prepare.ensure_dataset(
            config_of(tmp_path, source, version=child.id).model_copy(
                update={"data": named.data.model_copy(update={"resolution_px": 32})}
            )
        )
    with pytest.raises(InputError, match=r"expected dataset version 'fresco@0'.* found fresco@"):
        prepare.ensure_dataset(config_of(tmp_path, source, version="fresco@0"))


def test_growth_from_a_delivery_that_is_mostly_unusable_is_refused_and_leaves_nothing(
    tmp_path: Path, source: str
) -> None:
    config = config_of(tmp_path, source)
    parent = made(config, source)
    for index in range(100, 104):
        put(source, index)
    storage.write_bytes_atomic(f"{source}/101.png", b"no picture at all")
    found = looked_twice(config, parent)
    assert found.counts["new"] == 4
    before = sorted(path for path in Path(config.workspace).rglob("*") if path.is_file())
    with pytest.raises(DataError, match=r"at most 10% .* found 25\.0% \(3 usable\)"):
        grow(config, parent, found)
    assert sorted(path for path in Path(config.workspace).rglob("*") if path.is_file()) == before


def test_arrivals_that_vanish_before_they_are_examined_are_left_out_and_may_come_back(
    tmp_path: Path, source: str
) -> None:
    config = config_of(tmp_path, source)
    parent = made(config, source)
    for index in range(100, 110):
        put(source, index)
    found = looked_twice(config, parent)
    for index in range(100, 105):
        storage.delete(f"{source}/{index}.png")
    child = grow(config, parent, found)
    assert {item.caption for item in child.items} - {item.caption for item in parent.items} == {
        f"caption {index}" for index in range(105, 110)
    }
    for index in range(105, 110):
        storage.delete(f"{source}/{index}.png")
        storage.delete(f"{source}/{index}.txt")
    gone = replace(found, new=found.new[5:])
    assert {one.candidate.name for one in gone.new} == {f"{index}.png" for index in range(105, 110)}
    assert grow(config, parent, gone) is parent
    for index in range(100, 105):
        put(source, index)
    assert names(looked_twice(config, child).new) == [f"{index}.png" for index in range(100, 105)]


def test_a_table_that_vanishes_before_it_is_examined_is_left_out(tmp_path: Path, source: str) -> None:
    config = config_of(tmp_path, source)
    parent = made(config, source)
    images = [{"bytes": picture(100 + row), "path": None} for row in range(3)]
    rows = {"image": images, "text": [f"caption {100 + row}" for row in range(3)]}
    path = tmp_path / "more.parquet"
    pq.write_table(pa.table(rows), path)
    storage.write_bytes_atomic(f"{source}/more.parquet", path.read_bytes())
    found = looked_twice(config, parent)
    assert len(found.new) == 1
    storage.delete(f"{source}/more.parquet")
    assert grow(config, parent, found) is parent


def test_growth_needs_the_pixels_of_its_parent(tmp_path: Path, source: str) -> None:
    config = config_of(tmp_path, source)
    parent = made(config, source)
    put(source, 100)
    found = looked_twice(config, parent)
    next(Path(config.workspace).glob("encoded/pixels-*/*.parquet")).unlink()
    with pytest.raises(InputError, match=r"expected its 20 pictures under .* found 20 missing"):
        grow(config, parent, found)


def write_metadata(source: str, names_: dict[str, str], file: str = "metadata.jsonl") -> None:
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in names_.items()]
    storage.write_bytes_atomic(f"{source}/{file}", "\n".join(lines).encode())


def test_pictures_named_by_metadata_arrive_with_their_line(tmp_path: Path, source: str) -> None:
    config = config_of(tmp_path, source, max_rejected_fraction=0.5)
    captions = {f"{index:03}.png": f"caption {index}" for index in range(20)}
    for index in range(20):
        storage.write_bytes_atomic(f"{source}/{index:03}.png", picture(index))
    write_metadata(source, {**captions, "late.png": "comes later"})
    parent = prepare.ensure_dataset(config)
    storage.write_bytes_atomic(f"{source}/late.png", picture(99))
    storage.write_bytes_atomic(f"{source}/unnamed.png", picture(98))
    found = looked_twice(config, parent)
    assert names(found.new) == ["late.png"] and waiting(found) == {"unnamed.png": rules.NO_CAPTION_YET}
    write_metadata(source, {**captions, "late.png": "comes later", "unnamed.png": "named now", "never.png": "?"})
    changing = look(config, parent, found.cursor, SETTLE_S, at=2000)
    assert waiting(changing) == {
        "metadata.jsonl": rules.CHANGING,
        **dict.fromkeys(("late.png", "unnamed.png"), rules.CAPTIONS_CHANGING),
    }
    found = look(config, parent, changing.cursor, SETTLE_S, at=2000 + SETTLE_S)
    assert names(found.new) == ["late.png", "unnamed.png"] and waiting(found) == {"never.png": rules.NO_PICTURE_YET}
    child = grow(config, parent, found)
    assert {"comes later", "named now"} <= {item.caption for item in child.items}
    storage.write_bytes_atomic(f"{source}/sub/deep.png", picture(97))
    write_metadata(source, {"deep.png": "a delivery of its own"}, "sub/metadata.jsonl")
    assert names(looked_twice(config, child, found.cursor, at=3000).new) == ["sub/deep.png"]


def test_metadata_that_cannot_be_read_keeps_its_pictures_waiting(tmp_path: Path, source: str) -> None:
    config = config_of(tmp_path, source)
    parent = made(config, source)
    storage.write_bytes_atomic(f"{source}/sub/a.png", picture(99))
    storage.write_bytes_atomic(f"{source}/sub/metadata.jsonl", b'{"file_name": "a.png", "te')
    assert waiting(looked_twice(config, parent)) == {"a.png": rules.DAMAGED}


def test_tables_arrive_by_row_group(tmp_path: Path, source: str) -> None:
    config = config_of(tmp_path, source)

    def write(name: str, numbers: range) -> None:
        images = [{"bytes": picture(index), "path": None} for index in numbers]
        buffer = pa.BufferOutputStream()
        table = pa.table({"image": images, "text": [f"caption {index}" for index in numbers]})
        pq.write_table(table, buffer, row_group_size=8)
        storage.write_bytes_atomic(f"{source}/{name}", buffer.getvalue().to_pybytes())

    write("one.parquet", range(20))
    parent = prepare.ensure_dataset(config)
    write("two.parquet", range(15, 35))
    storage.write_bytes_atomic(f"{source}/half.parquet", b"PAR1 half")
    found = looked_twice(config, parent)
    assert [one.pictures for one in found.new] == [8, 8, 4] and waiting(found) == {"half.parquet": rules.DAMAGED}
    assert len(grow(config, parent, found).items) == 35


def test_a_version_without_listing_grows_too(tmp_path: Path, source: str) -> None:
    config = config_of(tmp_path, source)
    parent = made(config, source)
    (parent.directory / LISTING).unlink()
    put(source, 100)
    found = looked_twice(config, parent)
    assert names(found.new) == ["100.png"] and found.counts["repeated"] == 20
    assert look(config, grow(config, parent, found), found.cursor, SETTLE_S, at=2000).counts["repeated"] == 0


def test_built_in_data_that_is_left_for_a_folder_keeps_its_pictures(tmp_path: Path, source: str) -> None:
    parent = prepare.ensure_dataset(config_of(tmp_path, "emblems://base?count=30&seed=3"))
    config = config_of(tmp_path, source)
    put(source, 1)
    found = looked_twice(config, parent)
    assert names(found.new) == ["001.png"] and not found.missing
    assert len(grow(config, parent, found).items) == 31


def test_a_source_that_is_not_there_is_an_error_and_not_an_empty_one(tmp_path: Path, source: str) -> None:
    config = config_of(tmp_path, source)
    parent = made(config, source)
    for other in (source + "-gone", "gs://b", "https://b/?X-Amz-Signature=0123456789abcdef"):
        with pytest.raises(InputError) as raised:
            look(config_of(tmp_path, other), parent)
        assert "0123456789abcdef" not in str(raised.value)


def test_a_look_through_a_breaking_network_finds_the_same_or_says_that_it_failed(
    tmp_path: Path, bucket: str, s3_network: Network
) -> None:
    source = f"{bucket}/source"
    config = config_of(tmp_path, source)
    parent = made(config, source)
    for index in range(100, 105):
        put(source, index)
    cursor = look(config, parent, None, SETTLE_S, at=1000).cursor
    for fault in (SLOW_DOWN, RESET, TRUNCATE):
        s3_network.plan(Rule(fault, 2, "GET"), Rule(fault, 1, "GET .*10[0-4]"))
        assert look(config, parent, cursor, SETTLE_S, at=2000).counts["new"] == 5
        assert s3_network.struck[:2] == [fault, fault]
    s3_network.plan(Rule(SHORTEN, 1000, "GET .*list-type"))
    with pytest.raises(StorageError, match="could not list"):
        look(config, parent, cursor, SETTLE_S, at=3000)
    s3_network.plan()
    assert look(config, parent, cursor, SETTLE_S, at=3000).counts["new"] == 5, "the failed look left the cursor good"


def test_a_clock_that_was_set_back_settles_nothing_early(tmp_path: Path, source: str) -> None:
    config = config_of(tmp_path, source)
    parent = made(config, source)
    put(source, 100)
    first = look(config, parent, None, SETTLE_S, at=1_000_000)
    back = look(config, parent, first.cursor, SETTLE_S, at=1000)
    assert not back.new
    assert names(look(config, parent, back.cursor, SETTLE_S, at=1000 + SETTLE_S).new) == ["100.png"]


def test_credentials_show_in_no_record(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "wJalrXUtnFEMIK7MDENGbPxRfiCYDISTINCTIVE"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    monkeypatch.setenv("AWS_SESSION_TOKEN", secret[::-1])
    source = f"{bucket}/source"
    config = config_of(tmp_path, source)
    parent = made(config, source)
    put(source, 100)
    found = looked_twice(config, parent)
    grow(config, parent, found)
    files = prepare.SourceFiles(source, storage.aws_environment())
    written = [path.read_bytes() for path in Path(config.workspace).rglob("*") if path.is_file()]
    written += [repr(found).encode(), repr(files).encode(), repr(replace(files, root="x")).encode()]
    assert len(written) > 8
    assert not any(text.encode() in content for text in (secret, secret[::-1]) for content in written)
