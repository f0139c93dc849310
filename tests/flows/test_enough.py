"""What a look counts before a cycle: splits by hash, tables whose rows nobody knows, what a cycle before counted."""

import hashlib
from pathlib import Path

import pytest

from cluster.artifacts import open_workspace
from cluster.registry import TAG_DATASET, Version
from components.arrivals import Arrival, Arrivals
from components.dataset import SPLITS, TEST, TRAIN, VALIDATION, DatasetVersion, Item, split_of
from components.enough import Enough
from components.listings import Seen
from components.sources import Candidate
from flows import snapshot
from flows.config import Config, with_overrides
from flows.enough import Contest, count_look, count_version
from tests.loop_world import loop_config


def hashes(split: str, count: int, first: int = 0) -> list[str]:
    """Hashes that fall into a split at fractions of 0.2."""
    found: list[str] = []
    while len(found) < count:
        sha256 = hashlib.sha256(f"{first}".encode()).hexdigest()
        found += [sha256] if split_of(sha256, 0.2, 0.2) == split else []
        first += 1
    return found


PARENT = DatasetVersion("loop", "1", Path("nowhere"), tuple(Item(sha, "a", TEST, "u") for sha in hashes(TEST, 3)))
NAMED: Contest = (Version("loop", 1, "nowhere", 0.0, {TAG_DATASET: PARENT.id}), PARENT)
NEW = {split: hashes(split, 40, first=1000) for split in SPLITS}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return loop_config(tmp_path, tmp_path, "gate.min_test_pictures=5")


def seen_of(sha256s: list[str], *tables: int) -> Arrivals:
    pictures = [Arrival(Candidate(sha, sha), (Seen(f"{sha}.png", 1, "e"),), sha) for sha in sha256s]
    groups = [
        Arrival(Candidate(f"t{number}", "t", row_group=0), (Seen(f"t{number}", 1, "e"),), "", rows)
        for number, rows in enumerate(tables)
    ]
    return Arrivals((*pictures, *groups), (), (), (), {}, {"parent": PARENT.id})


def test_pictures_are_counted_by_the_hash_and_rows_of_tables_may_be_anything(config: Config) -> None:
    workspace = open_workspace(config.workspace)
    few = [*NEW[TEST][:4], *NEW[TRAIN][:7], *NEW[VALIDATION][:2]]
    found = count_look(config, workspace, NAMED, seen_of(few), None)
    assert (found.pictures, found.tests, found.trains, found.unsorted) == (13, 4, 7, 0)
    assert "found 4 among 13 new pictures" in found.problem
    assert not count_look(config, workspace, NAMED, seen_of([*few, NEW[TEST][4]]), None).problem
    assert not count_look(config, workspace, NAMED, seen_of(few, 3), None).problem, "a table of 3 rows may do"
    unnamed = (Version("loop", 1, "nowhere", 0.0, {}), PARENT)
    assert count_look(config, workspace, unnamed, seen_of(few), None).tests == 4 + 3, "as the gate counts"


def test_what_a_cycle_counted_stands_until_enough_others_have_come_or_the_split_changes(config: Config) -> None:
    workspace = open_workspace(config.workspace)
    seen = seen_of([*NEW[TEST][:6], *NEW[TRAIN][:7]], 30)
    known = [*NEW[TEST][:2], *NEW[TRAIN][:9]]  # what `prepare` made of them
    items = tuple(Item(sha, "a", split_of(sha, 0.2, 0.2), "u") for sha in known)
    counted, short = count_version(config, NAMED, DatasetVersion("loop", "2", Path("nowhere"), PARENT.items + items))
    assert (counted.pictures, counted.tests, counted.trains) == (11, 2, 9) and counted.problem
    snapshot.freeze(workspace, "cycle-0001", seen)
    short = {"cycle": "cycle-0001", **short}
    assert count_look(config, workspace, NAMED, seen, None).problem == ""
    assert count_look(config, workspace, NAMED, seen, short) == Enough(11, 2, 9, 5, 0, 0.2)
    more = seen_of([*NEW[TEST][:6], *NEW[TRAIN][:7], *NEW[TEST][20:22]], 30)
    assert count_look(config, workspace, NAMED, more, short).tests == 4
    assert count_look(config, workspace, NAMED, seen_of([*NEW[TEST][:6], *NEW[TRAIN][:7]], 30, 14), short).problem
    assert not count_look(config, workspace, NAMED, seen_of([*NEW[TEST][:6], *NEW[TRAIN][:7]], 30, 15), short).problem
    larger = with_overrides(config, {"data.test_fraction": 0.3})
    assert not count_look(larger, workspace, NAMED, seen, short).problem, "other fractions, another split"
