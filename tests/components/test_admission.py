"""Fair admission: shares by priority, no size starves another, memory is kept for who waits."""

from collections import Counter
from dataclasses import dataclass

import pytest

from components.admission import FairQueue, FairShares, Room, check_deadline
from components.errors import DeadlineError, QueueFullError


@dataclass(frozen=True)
class Row:
    key: str = ""
    shape: str = "small"
    pixel_steps: int = 10
    priority: float = 1.0
    number: int = 0


def always(row: Row) -> Room:
    return Room.YES


def take_all(queue: FairQueue[Row], count: int) -> list[Row]:
    taken = [queue.take(always) for _ in range(count)]
    return [row for row in taken if row is not None]


def filled(*rows: Row) -> FairQueue[Row]:
    queue: FairQueue[Row] = FairQueue(10_000)
    for row in rows:
        queue.push([row])
    return queue


def test_rows_of_one_key_and_size_keep_their_order() -> None:
    rows = [Row(number=number) for number in range(5)]
    assert take_all(filled(*rows), 9) == rows


def test_a_key_with_a_thousand_rows_does_not_delay_a_key_with_one() -> None:
    queue = filled(*[Row("greedy", number=number) for number in range(1000)])
    take_all(queue, 500)
    queue.push([Row("modest")])
    assert "modest" in {row.key for row in take_all(queue, 2)}


def test_priority_is_a_share_of_the_pixel_steps() -> None:
    both = [Row(key, priority=priority) for key, priority in (("a", 1.0), ("b", 3.0)) for _ in range(100)]
    first = Counter(row.key for row in take_all(filled(*both), 80))
    assert first["b"] == pytest.approx(3 * first["a"], abs=3)


def test_small_and_large_requests_share_pixel_steps_whatever_their_number() -> None:
    small = [Row("a", "small", 10, number=number) for number in range(400)]
    large = [Row("b", "large", 200, number=number) for number in range(20)]
    taken = take_all(filled(*small, *large), 210)
    cost = Counter[str]()
    for row in taken:
        cost[row.shape] += row.pixel_steps
    assert cost["large"] == pytest.approx(cost["small"], abs=200)


def test_a_key_that_sends_two_sizes_gets_one_share() -> None:
    rows = []
    for number in range(120):
        rows += [Row("two", "small", number=number), Row("two", "wide", number=number), Row("one", number=number)]
    first = Counter(row.key for row in take_all(filled(*rows), 120))
    assert first["one"] == pytest.approx(first["two"], abs=4)


def test_a_key_that_asks_for_many_sizes_passes_nobody() -> None:
    queue = filled(Row("b"), *[Row("a", f"size {n}") for n in range(30)], *[Row("b", number=n) for n in range(1, 30)])
    first = Counter(row.key for row in take_all(queue, 20))
    assert first["b"] == pytest.approx(10, abs=2)


def test_a_large_row_is_not_behind_all_small_ones_of_its_own_key() -> None:
    queue = filled(*[Row("a", "small", 10, number=n) for n in range(100)], Row("a", "large", 50))
    assert Row("a", "large", 50) in take_all(queue, 10)


def test_cancelling_does_not_forgive_what_was_drawn() -> None:
    queue = filled(*[Row("b", number=number) for number in range(5)])
    order = []
    for _ in range(20):
        queue.push([Row("a", number=1)])
        while (row := queue.take(always)) is not None and row.key == "b":
            order.append("b")
        order.append("a")
        queue.push([Row("a", number=2)])
        queue.remove(lambda row: row.number == 2 and row.key == "a")
    assert order.count("b") == 5


def test_places_of_a_full_batch_add_up_for_the_row_that_needs_two() -> None:
    """A guided row needs two places; unguided ones of another key came for each that fell free."""
    queue = filled(Row("a", number=2), *[Row("b", number=1) for _ in range(20)])
    free, taken = 1, []

    def room(row: Row) -> Room:
        return Room.YES if row.number <= free else Room.BATCH_FULL

    while not taken or taken[-1].number != 2:
        assert len(taken) < 5, "the guided row waits for ever"
        while (row := queue.take(room)) is not None:
            taken.append(row)
            free -= row.number
        free += 1


def test_a_full_batch_of_one_size_does_not_block_another() -> None:
    queue = filled(Row("a", "large"), Row("a", "large"), Row("a", "small", number=7))
    row = queue.take(lambda row: Room.BATCH_FULL if row.shape == "large" else Room.YES)
    assert row is not None and row.number == 7
    assert queue.take(lambda row: Room.BATCH_FULL) is None and len(queue) == 2


def test_what_passes_a_row_that_waits_for_memory_costs_no_more_than_it() -> None:
    queue = filled(Row("big", "large", pixel_steps=100), *[Row("s", number=number) for number in range(50)])
    passed = []
    while (row := queue.take(lambda row: Room.NO_MEMORY if row.shape == "large" else Room.YES)) is not None:
        passed.append(row)
    assert sum(row.pixel_steps for row in passed) == 100
    # Memory has come free: the row that waited goes first.
    assert queue.take(always) == Row("big", "large", pixel_steps=100)


def test_a_bounded_queue_takes_all_or_nothing_and_says_how_long_it_is() -> None:
    queue: FairQueue[Row] = FairQueue(3)
    queue.push([Row(), Row()])
    with pytest.raises(
        QueueFullError, match=r"room for 2 pictures, found 2 of 3 waiting \(20 pixel-steps, about 4\.0 s"
    ):
        queue.push([Row(), Row()], backlog=20, backlog_s=4.0)
    assert len(queue) == 2 and queue.pixel_steps == 20
    queue.push([Row()])
    with pytest.raises(QueueFullError, match="at a speed not measured yet") as told:
        queue.push([Row()])
    assert told.value.retry_after_s is None


def test_one_key_leaves_half_of_the_queue_to_others() -> None:
    queue: FairQueue[Row] = FairQueue(12)
    for number in range(6):
        queue.push([Row("greedy", number=number)])
    with pytest.raises(
        QueueFullError, match=r"key expected to hold at most 6 of 12 places, found 6 and 1 more"
    ) as told:
        queue.push([Row("greedy")], backlog=60, backlog_s=3.0)
    assert told.value.retry_after_s == 3.0
    queue.push([Row("modest")] * 4)
    assert len(queue) == 10


def test_a_keys_places_grow_with_its_priority() -> None:
    queue: FairQueue[Row] = FairQueue(100)
    for number in range(30):
        queue.push([Row("low", number=number)])
    for number in range(44):
        queue.push([Row("high", priority=4.0, number=number)])
    with pytest.raises(QueueFullError, match="at most 16 of 100"):
        queue.push([Row("low")])
    with pytest.raises(QueueFullError, match="at most 44 of 100"):
        queue.push([Row("high", priority=4.0)])


def test_a_key_that_holds_nothing_may_always_take_a_free_place() -> None:
    queue: FairQueue[Row] = FairQueue(12)
    for number in range(9):
        queue.push([Row(f"key {number}")])
    queue.push([Row("new")] * 3)
    with pytest.raises(QueueFullError, match="found 12 of 12 waiting"):
        queue.push([Row("newer")])


def test_without_keys_the_whole_queue_is_everybodys() -> None:
    queue: FairQueue[Row] = FairQueue(12)
    for number in range(12):
        queue.push([Row(number=number)])
    with pytest.raises(QueueFullError, match="found 12 of 12 waiting"):
        queue.push([Row()])


def test_removed_rows_free_their_places_and_idle_keys_are_forgotten() -> None:
    queue = filled(*[Row(str(key), number=key) for key in range(50)])
    removed = queue.remove(lambda row: row.number % 2 == 0)
    assert len(removed) == 25 and len(queue) == 25 and queue.pixel_steps == 250
    assert {row.number % 2 for row in take_all(queue, 99)} == {1}
    for key in range(50, 150):
        queue.push([Row(str(key))])
        queue.take(always)
    assert len(queue) == 0 and len(queue._keys) < 60, "keys that were served cost nothing for ever"


def test_what_comes_before_a_new_row_is_its_own_keys_backlog_and_the_others_fair_part() -> None:
    queue = filled(*[Row("greedy", number=number) for number in range(20)])
    assert queue.pixel_steps_before(Row("greedy")) == 200
    assert queue.pixel_steps_before(Row("new")) <= 10


def served(weights: dict[str, float], costs: dict[str, int], steps: int) -> Counter[str]:
    shares, cost = FairShares(), Counter[str]()
    for _ in range(steps):
        name = str(shares.next(dict(weights)))
        shares.charge(name, costs[name], weights[name])
        cost[name] += costs[name]
    return cost


def test_groups_are_served_by_weight_whatever_their_steps_cost() -> None:
    cost = served({"many small": 3.0, "one large": 1.0}, {"many small": 10, "one large": 100}, 400)
    assert cost["many small"] == pytest.approx(3 * cost["one large"], rel=0.1)


def test_a_group_that_comes_later_neither_waits_nor_catches_up() -> None:
    shares = FairShares()
    for _ in range(100):
        shares.next({"old": 1.0})
        shares.charge("old", 10, 1.0)
    first = []
    for _ in range(20):
        name = shares.next({"old": 1.0, "new": 1.0})
        shares.charge(name, 10, 1.0)
        first.append(name)
    assert Counter(first) == {"old": 10, "new": 10}


def test_room_is_refused_with_the_seconds_until_there_is_some() -> None:
    queue: FairQueue[Row] = FairQueue(5)
    queue.check(5, "", 1.0)
    with pytest.raises(
        QueueFullError, match=r"room for 6 pictures, found 0 of 5 .*100 pixel-steps, about 2\.0 s"
    ) as full:
        queue.check(6, "", 1.0, 100, 2.0)
    assert full.value.retry_after_s == 2.0
    with pytest.raises(QueueFullError, match="not measured yet") as unknown:
        queue.check(6, "", 1.0)
    assert unknown.value.retry_after_s is None


@pytest.mark.parametrize(
    ("limit_s", "waiting_s", "drawing_s", "alone_s", "retry_after_s"),
    [(5.0, 4.0, 3.0, 2.0, 2.0), (2.0, 0.0, 6.0, 2.0, 4.0), (1.9, 4.0, 3.0, 2.0, None), (1.9, 0.0, 2.0, 2.0, None)],
)
def test_deadline_is_refused_for_now_where_alone_it_could_be_met(
    limit_s: float, waiting_s: float, drawing_s: float, alone_s: float, retry_after_s: float | None
) -> None:
    with pytest.raises(DeadlineError, match=rf"{waiting_s:.2f} s waiting, {drawing_s:.2f} s drawing") as refused:
        check_deadline(limit_s, waiting_s, drawing_s, alone_s)
    assert refused.value.retry_after_s == retry_after_s
    assert ("others are at work" in str(refused.value)) == (retry_after_s is not None)
    check_deadline(waiting_s + drawing_s, waiting_s, drawing_s, alone_s)
