"""What counts as arrived: tables of cases, and the one-pass pairing against a plain one."""

import posixpath
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.arrivals import (
    CAPTIONS,
    CHANGING,
    EMPTY,
    METADATA,
    NO_CAPTION_YET,
    NO_PICTURE_YET,
    TABLES,
    Pending,
    State,
    Whole,
    carried_over,
    layout_of,
    pairs,
    states,
)
from components.listings import Seen


def seen(uri: str, etag: str = "1", since: float = 0.0, size_bytes: int = 5, sha256: str = "") -> Seen:
    return Seen(uri, size_bytes, etag, since, sha256)


def state(uri: str, held: bool = False, settled: bool = True, size_bytes: int = 5) -> State:
    return State(seen(uri, size_bytes=size_bytes), held, settled)


def test_a_file_keeps_the_time_since_when_it_is_as_it_is_until_it_changes() -> None:
    before = [seen("changed", since=10, sha256="x"), seen("gone", since=10), seen("same", since=10, sha256="x")]
    now = [seen("changed", etag="2"), seen("new"), seen("same")]
    carried = {one.uri: (one.since, one.sha256) for one in carried_over(now, before, at=20)}
    assert carried == {"changed": (20, ""), "new": (20, ""), "same": (10, "x")}


def test_a_clock_set_back_makes_a_file_wait_anew() -> None:
    (carried,) = carried_over([seen("a")], [seen("a", since=1000)], at=20)
    assert carried.since == 20


def test_states_tell_held_settled_and_missing() -> None:
    now = [seen("held"), seen("new", since=0), seen("replaced", etag="2", since=15), seen("young", since=15)]
    held = [seen("gone"), seen("held"), seen("replaced")]
    found = list(states(now, held, at=20, settle_s=10))
    assert [one for one in found if isinstance(one, str)] == ["gone", "replaced"]
    flags = {one.seen.uri: (one.held, one.settled) for one in found if isinstance(one, State)}
    assert flags == {"held": (True, True), "new": (False, True), "replaced": (False, False), "young": (False, False)}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([state("a.png"), state("a.txt")], [("a.png", "a.txt")]),
        ([state("a.PNG"), state("a.TXT")], [("a.PNG", "a.TXT")]),
        ([state("a.png")], [("a.png", NO_CAPTION_YET)]),
        ([state("a.txt")], [("a.txt", NO_PICTURE_YET)]),
        ([state("a.png", settled=False), state("a.txt")], [("a.png", CHANGING)]),
        ([state("a.png"), state("a.txt", settled=False)], [("a.txt", CHANGING)]),
        ([state("a.png", size_bytes=0), state("a.txt")], [("a.png", EMPTY)]),
        ([state("a.png"), state("a.txt", size_bytes=0)], [("a.txt", EMPTY)]),
        ([state("a.png", held=True), state("a.txt", held=True)], []),
        ([state("a.png", held=True, settled=False), state("a.txt", held=True, settled=False)], []),
        ([state("a.png", held=True), state("a.txt")], [("a.png", "a.txt")]),
        ([state("a.png"), state("a.txt", held=True)], [("a.png", "a.txt")]),
        ([state("a.png", held=True)], []),
        ([state("a.txt", held=True)], []),
        ([state("a.jpg"), state("a.png"), state("a.txt")], [("a.jpg", "a.txt"), ("a.png", "a.txt")]),
        ([state("a"), state("notes.md")], []),
    ],
)
def test_pairs_come_when_both_halves_are_whole(files: list[State], expected: list[tuple[str, str]]) -> None:
    assert [outcome(one) for one in pairs(files)] == expected


def outcome(one: Whole | Pending) -> tuple[str, str]:
    if isinstance(one, Pending):
        return one.uri, one.reason
    return one.files[0].uri, one.files[1].uri


NAMES = st.sets(
    st.builds(
        "".join, st.lists(st.sampled_from(["a", "b", ".", "-", "/", "a.png", "b.txt", ".png", ".txt"]), max_size=5)
    ).filter(lambda name: name and not name.startswith((".", "/")) and "/." not in name),
    max_size=25,
)


@given(NAMES)
def test_pairing_in_one_pass_finds_what_a_look_at_all_names_finds(names: set[str]) -> None:
    found = {outcome(one) for one in pairs(state(name) for name in sorted(names))}
    pictures = {name for name in names if name.endswith(".png")}
    captions = {posixpath.splitext(name)[0]: name for name in names if name.endswith(".txt")}
    expected = {(name, captions.get(posixpath.splitext(name)[0], NO_CAPTION_YET)) for name in pictures}
    stems = {posixpath.splitext(name)[0] for name in pictures}
    expected |= {(name, NO_PICTURE_YET) for stem, name in captions.items() if stem not in stems}
    assert found == expected


def test_pairing_holds_few_names_however_many_there_are() -> None:
    read = 0

    def files() -> Iterator[State]:
        nonlocal read
        for name in sorted(f"{index}{suffix}" for index in range(3000) for suffix in (".png", ".txt")):
            read += 1
            yield state(name)

    for number, _ in enumerate(pairs(files()), 1):
        assert read - 2 * number <= 2


def test_layout_is_chosen_as_prepare_chooses_it() -> None:
    assert layout_of(["a.parquet", "b.png", "sub/metadata.csv"]) == METADATA
    assert layout_of(["a.parquet", "b.png", "b.txt"]) == TABLES
    assert layout_of(["b.png", "b.txt"]) == CAPTIONS
