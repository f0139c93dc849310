"""Proposals: reproducible by number, repeated after a kill, and better than chance once losses are told."""

import math
from typing import Any

from cluster.proposals import COMPLETE, FAILED, STOPPED, Proposer, Told


def draw(trial: Any) -> dict[str, Any]:
    plan = trial.suggest_categorical("plan", ["a", "b"])
    overrides = {"plan": plan, "rate": trial.suggest_float("rate", 1e-5, 1e-1, log=True)}
    if plan == "b":
        overrides["momentum"] = trial.suggest_float("momentum", 0.0, 1.0)
    return overrides


def loss(overrides: dict[str, Any]) -> float:
    """A bowl around rate 1e-3, lower for plan b."""
    return (math.log10(overrides["rate"]) + 3) ** 2 + (0.0 if overrides["plan"] == "b" else 1.0)


def told(overrides: dict[str, Any]) -> Told:
    value = loss(overrides)
    if value > 4:
        return Told(FAILED, overrides, [])
    return Told(COMPLETE if value < 1 else STOPPED, overrides, [(0.1, value + 1), (1.0 if value < 1 else 0.3, value)])


def search(sampler: str, seed: int, trials: int, known: int = 0) -> list[dict[str, Any]]:
    """Run a search; with `known` it was killed after so many trials and told them again."""
    proposer = Proposer(sampler, seed, 3, draw)
    asked: list[dict[str, Any]] = []
    for number in range(trials):
        if number == known and known:
            proposer = Proposer(sampler, seed, 3, draw)
            for earlier, overrides in enumerate(asked):
                proposer.repeat(earlier, overrides)
                proposer.tell(earlier, told(overrides))
        asked.append(proposer.propose(number))
        proposer.tell(number, told(asked[-1]))
    return asked


def test_search_that_was_killed_proposes_what_it_would_have_proposed() -> None:
    straight = search("tpe", 1, 14)
    assert search("tpe", 1, 14, known=8) == straight
    assert search("tpe", 2, 14) != straight
    assert len({tuple(overrides.items()) for overrides in straight}) == 14


def test_tpe_comes_closer_than_random_draws_and_starts_with_the_same_ones() -> None:
    wins = 0
    for seed in range(8):
        smart, chance = search("tpe", seed, 24), search("random", seed, 24)
        assert smart[:3] == chance[:3]
        wins += sum(map(loss, smart[12:])) < sum(map(loss, chance[12:]))
    assert wins >= 7


def test_discarded_proposal_is_followed_by_another() -> None:
    proposer = Proposer("tpe", 0, 3, draw)
    first = proposer.propose(0)
    proposer.discard(0)
    assert proposer.propose(0, attempt=1) != first


def test_small_space_is_used_up_to_its_last_recipe() -> None:
    proposer = Proposer("tpe", 0, 1, lambda trial: {"x": trial.suggest_categorical("x", [1, 2, 3, 4, 5, 6])})
    found: list[int] = []
    for number in range(6):
        for attempt in range(100):
            value = proposer.propose(number, attempt)["x"]
            if value not in found:
                break
            proposer.discard(number)
        found.append(value)
        proposer.tell(number, Told(COMPLETE, {"x": value}, [(1.0, 0.5 + value)]))
    assert sorted(found) == [1, 2, 3, 4, 5, 6]


def test_evolution_proposes_too() -> None:
    assert len(search("evolution", 0, 12)) == 12


def test_earlier_searches_are_told_where_this_space_could_have_drawn_them() -> None:
    cold, warm = Proposer("tpe", 0, 0, draw), Proposer("tpe", 0, 0, draw)
    near = [{"plan": "b", "rate": 10 ** (-3 + i / 50), "momentum": 0.5} for i in range(10)]
    far = [{"plan": "a", "rate": 10 ** (-4.9 + i / 50)} for i in range(20)]
    assert all(warm.tell_earlier(told(overrides)) for overrides in [*near, *far])
    assert not warm.tell_earlier(Told(COMPLETE, {"plan": "c", "rate": 1e-3}, [(1.0, 0.1)]))
    assert not warm.tell_earlier(Told(COMPLETE, {"plan": "a", "rate": 3.0}, [(1.0, 0.1)]))
    assert not warm.tell_earlier(Told(COMPLETE, {"plan": "b", "rate": 1e-3}, [(1.0, 0.1)])), "momentum is missing"
    assert not warm.tell_earlier(Told(COMPLETE, {"plan": "a", "rate": 1e-3, "other": 1}, [(1.0, 0.1)]))
    others = range(20)
    assert sum(loss(warm.propose(i)) for i in others) < 0.7 * sum(loss(cold.propose(i)) for i in others)
