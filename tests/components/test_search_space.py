"""The search space: what YAML means, what is refused, and that a draw holds only what has an effect."""

import random
from collections.abc import Sequence
from typing import Any

import pytest

from components.errors import InputError
from components.search_space import DEFAULT_SPACE, SearchSection, default_grace, draw, own_recipe, parse_space
from flows.config import known_keys

RECIPE = {
    "train.freezing": "all",
    "train.optimizer": "adamw",
    "train.weighting": "none",
    "train.learning_rate.denoiser": 1e-3,
    "train.learning_rate.text_encoder": 2e-4,
}


class Dice:
    """Draws from a seeded generator and keeps what it was asked."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.asked: list[str] = []

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        self.asked.append(name)
        return low * (high / low) ** self.random.random() if log else self.random.uniform(low, high)

    def suggest_int(self, name: str, low: int, high: int) -> int:
        self.asked.append(name)
        return self.random.randint(low, high)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        self.asked.append(name)
        return self.random.choice(list(choices))


def test_rates_are_drawn_only_for_what_the_drawn_plan_trains() -> None:
    plans = ["denoiser", "text_encoder", "text_encoder_top:1", "all", "lora:4"]
    space = parse_space({**DEFAULT_SPACE, "train.freezing": {"choice": plans}}, known_keys())
    seen = {}
    for seed in range(60):
        overrides = draw(space, RECIPE, Dice(seed))
        seen[overrides["train.freezing"]] = {path.rpartition(".")[2] for path in overrides} - {"freezing"}
    assert seen == {
        "denoiser": {"denoiser"},
        "lora:4": {"denoiser"},
        "text_encoder": {"text_encoder"},
        "text_encoder_top:1": {"text_encoder"},
        "all": {"denoiser", "text_encoder"},
    }


def test_conditions_look_at_the_recipe_and_at_the_draw_wherever_they_stand() -> None:
    space = parse_space(
        {
            "train.momentum": {"uniform": [0.5, 0.9]},
            "train.warmup_steps": {"int": [1, 9], "when": {"train.optimizer": ["sgd"]}},
            "train.min_snr_gamma": {"uniform": [1, 9]},
            "train.optimizer": {"choice": ["adamw", "sgd"]},
        },
        known_keys(),
    )
    draws = [draw(space, RECIPE, Dice(seed)) for seed in range(30)]
    for overrides in draws:
        with_sgd = overrides["train.optimizer"] == "sgd"
        assert ("train.momentum" in overrides) == ("train.warmup_steps" in overrides) == with_sgd
        assert "train.min_snr_gamma" not in overrides, "the recipe's weighting is none"
    assert len({overrides["train.optimizer"] for overrides in draws}) == 2


def test_own_recipe_has_the_keys_of_a_draw_and_must_lie_in_the_space() -> None:
    space = parse_space(DEFAULT_SPACE, known_keys())
    frozen = {**RECIPE, "train.freezing": "denoiser"}
    assert own_recipe(space, RECIPE) == {path: RECIPE[path] for path in DEFAULT_SPACE}
    assert own_recipe(space, frozen).keys() == DEFAULT_SPACE.keys() - {"train.learning_rate.text_encoder"}
    with pytest.raises(InputError, match="does not hold the config's own value 'text_encoder'"):
        own_recipe(space, {**RECIPE, "train.freezing": "text_encoder"})
    with pytest.raises(InputError, match=r"learning_rate.denoiser .* 0.5 \(\[0.0001, 0.005\]\)"):
        own_recipe(space, {**RECIPE, "train.learning_rate.denoiser": 0.5})


def test_drawn_numbers_are_inside_their_range_and_short_enough_to_type() -> None:
    low, high = 1.23456e-4, 9.87654e-4
    space = parse_space({"train.learning_rate.denoiser": {"loguniform": [low, high]}}, known_keys())
    for seed in range(200):
        value = draw(space, RECIPE, Dice(seed))["train.learning_rate.denoiser"]
        assert low <= value <= high
        assert value in (low, high) or f"{value:.3e}" == f"{value:.9e}".replace("000000e", "e")
        assert float(repr(value)) == value


def test_yaml_numbers_without_a_dot_are_numbers() -> None:
    path = "train.learning_rate.denoiser"
    written = SearchSection(space={path: {"choice": ["1e-4", "1e+30", 1]}, "train.freezing": {"choice": ["lora:8"]}})
    read = SearchSection(space={path: {"choice": [1e-4, 1e30, 1]}, "train.freezing": {"choice": ["lora:8"]}})
    assert written == read
    (one,) = parse_space(SearchSection(space={path: {"loguniform": ["1e-4", "1e-3"]}}).space, known_keys())
    assert one.edges() == [1e-4, 1e-3]


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "at least one recipe path"),
        ({"train.freezin": {"choice": ["all"]}}, "nearest key: 'train.freezing'"),
        ({"placement.workers": {"choice": [1, 2]}}, "placement never changes a result"),
        ({"data.resolution_px": {"choice": [32, 64]}}, "only keys of train"),
        ({"train.learning_rate": {"uniform": [0, 1]}}, "found a section"),
        ({"train.steps": {"int": [1, 5]}}, "schedule must not change"),
        ({"train.seed": {"int": [1, 5]}}, "trials share one seed"),
        ({"train.caption_dropout": {"uniform": [0.5, 0.5]}}, "the empty range"),
        ({"train.caption_dropout": {"uniform": [0.5]}}, r"expected \[low, high\]"),
        ({"train.learning_rate.denoiser": {"loguniform": [0, 1]}}, "low > 0"),
        ({"train.freezing": {"choice": []}}, "a list of values"),
        ({"train.global_batch": {"int": [1.5, 8]}}, "whole ends"),
        ({"train.freezing": {"normal": [0, 1]}}, "expected one of loguniform, uniform, choice, int, found normal"),
        ({"train.momentum": {"uniform": [0, 0.9], "when": {"train.optimiser": ["sgd"]}}}, "'train.optimizer'"),
    ],
)
def test_what_cannot_be_searched_is_refused_with_the_reason(space: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_space(space, known_keys())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("steps", "every", "grace"), [(900, 300, 300), (900, 50, 100), (10, 20, 10), (90, 10, 10)])
def test_grace_is_a_ninth_of_a_run_in_whole_evaluations(steps: int, every: int, grace: int) -> None:
    assert default_grace(steps, every) == grace
