"""Shares of requests: the right size, growing without anybody changing sides, independent for different uses."""

from cluster.request_shares import in_share

NUMBERS = range(20_000)


def chosen(share: float, salt: str) -> set[int]:
    return {number for number in NUMBERS if in_share(f"req-{number}", share, salt)}


def test_share_of_requests_is_the_share_asked_for_and_a_larger_one_contains_it() -> None:
    tenth = chosen(0.1, "a")
    # Four standard deviations of a binomial of 20,000.
    assert abs(len(tenth) - 2000) < 4 * (20_000 * 0.1 * 0.9) ** 0.5
    assert tenth == chosen(0.1, "a") and tenth <= chosen(0.2, "a")
    assert chosen(0, "a") == set() and chosen(1, "a") == set(NUMBERS)


def test_shares_of_two_uses_are_independent() -> None:
    both = chosen(0.5, "a") & chosen(0.5, "b")
    assert abs(len(both) - 5000) < 4 * (20_000 * 0.25 * 0.75) ** 0.5
