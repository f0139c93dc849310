"""What a search may vary: a space in YAML becomes dimensions, and one draw becomes overrides of a recipe.

    train.freezing:                    {choice: [denoiser, all, "lora:8"]}
    train.learning_rate.denoiser:      {loguniform: [1.0e-4, 5.0e-3]}
    train.learning_rate.text_encoder:  {loguniform: [1.0e-5, 1.0e-3]}
    train.momentum:                    {uniform: [0.5, 0.99], when: {train.optimizer: [sgd]}}

A dimension that the rest of the draw makes meaningless is left out (no text encoder's rate while it is frozen). Only
`train` can be searched: placement never changes a result, and other data would make the losses incomparable. Who draws
(Optuna, a test) is behind `Suggest`. Light on purpose: no torch, no ray.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydantic import Field, field_validator

from components.errors import InputError
from components.recipe import Section, check_plan_name, trains_text

KINDS = ("loguniform", "uniform", "choice", "int")
DEFAULT_SPACE: dict[str, dict[str, Any]] = {
    "train.freezing": {"choice": ["denoiser", "denoiser_attention", "all", "lora:8"]},
    "train.learning_rate.denoiser": {"loguniform": [1e-4, 5e-3]},
    "train.learning_rate.text_encoder": {"loguniform": [1e-5, 1e-3]},
}
REFUSED = {
    "train.steps": "a trial is a whole run that may be stopped early: its schedule must not change",
    "train.seed": "trials share one seed, so that they differ by their recipe alone; set train.seed for all of them",
    "train.eval_images": "losses over different pictures cannot be compared",
    "train.eval_every_steps": "trials are compared at common steps",
    "train.patience": "stopping is the scheduler's work in a search",
}
DIGITS = 4  # of a drawn number: enough to search, short enough to type again after --set


class SearchSection(Section):
    trials: int = Field(8, ge=1)
    """Trials of the search; raising it later adds trials to the same search."""
    space: dict[str, dict[str, Any]] = DEFAULT_SPACE
    """Dotted recipe path -> {loguniform | uniform | int: [low, high]} or {choice: [...]}, optionally with `when`."""
    sampler: Literal["tpe", "random", "evolution"] = "tpe"
    """Who proposes: tpe learns from the losses, random does not, evolution breeds from the best (NSGA-II)."""
    scheduler: Literal["asha", "median", "none"] = "asha"
    """Who stops trials early: successive halving, the median of the earlier ones at the same step, nobody."""
    own_recipe: bool = True
    """The first trial is the config's own recipe: what the search has to beat. Off: only drawn ones."""
    random_trials: int = Field(4, ge=0)
    """So many trials after it are drawn at random, whatever the sampler."""
    warm_start: bool = True
    """Let the sampler learn from earlier searches of this workspace on the same family of models."""
    grace_steps: int = Field(0, ge=0)
    """No trial is stopped before; 0 takes a ninth of train.steps, and at least one evaluation."""
    reduction_factor: float = Field(3, gt=1)
    """ASHA lets about one trial in so many pass each rung, and rungs are so many times further apart."""
    budget_steps: int = Field(0, ge=0)
    """Stop searching after so many optimizer steps over all trials; 0 sets no limit. The winner's rest comes on top."""
    budget_minutes: float = Field(0, ge=0)
    """Stop searching after so much time, over all commands that continued the search; 0 sets no limit."""
    concurrent: int = Field(0, ge=0)
    """Trials at the same time; 0 takes as many as the cluster has room for."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the proposals; the trials' own seed is train.seed."""

    @field_validator("space", mode="before")
    @classmethod
    def _read_numbers(cls, space: Any) -> Any:
        """YAML 1.1 reads 1e-4 (no dot) as text; the same space must be the same search however it was written."""
        return _with_numbers(space)


def _with_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_numbers(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_with_numbers(one) for one in value]
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


@dataclass(frozen=True)
class Dimension:
    """One searched key of the recipe."""

    path: str
    kind: str
    low: float = 0.0
    high: float = 0.0
    choices: tuple[Any, ...] = ()
    when: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    """Drawn only while each of these paths has one of these values."""

    def edges(self) -> list[Any]:
        """Return every choice, or both ends of the range: what must be valid for the search to be."""
        if self.kind == "choice":
            return list(self.choices)
        return [int(self.low), int(self.high)] if self.kind == "int" else [self.low, self.high]

    def holds(self, value: Any) -> bool:
        """Whether the dimension could have drawn the value."""
        return value in self.choices if self.kind == "choice" else self.low <= value <= self.high


class Suggest(Protocol):
    """Draws one value; the three calls of an Optuna trial."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def suggest_int(self, name: str, low: int, high: int) -> int: ...

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


def parse_space(space: Mapping[str, Mapping[str, Any]], known: Sequence[str]) -> list[Dimension]:
    """Turn the YAML into dimensions, what others depend on first; InputError names what cannot be searched."""
    if not space:
        raise InputError(
            "search.space expected at least one recipe path, found none; see the user guide for an example"
        )
    dimensions = [_dimension(path, dict(entry), known) for path, entry in space.items()]
    asked = {path for one in dimensions for path, _ in one.when} | {
        path for paths, _ in NEEDED.values() for path in paths
    }
    return sorted(dimensions, key=lambda one: (one.path not in asked, bool(one.when)))


def draw(space: Sequence[Dimension], values: Mapping[str, Any], suggest: Suggest) -> dict[str, Any]:
    """Return overrides by dotted path. `values` are the recipe's own, for conditions on what is not searched."""
    drawn: dict[str, Any] = {}
    for one in space:
        present = {**values, **drawn}
        if not _applies(one, present):
            continue
        if one.kind == "choice":
            drawn[one.path] = suggest.suggest_categorical(one.path, one.choices)
        elif one.kind == "int":
            drawn[one.path] = suggest.suggest_int(one.path, int(one.low), int(one.high))
        else:
            value = suggest.suggest_float(one.path, one.low, one.high, log=one.kind == "loguniform")
            drawn[one.path] = min(max(float(f"{value:.{DIGITS}g}"), one.low), one.high)
    return drawn


def own_recipe(space: Sequence[Dimension], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe's own values of what is searched, as `draw` would; InputError names one outside the space."""
    own: dict[str, Any] = {}
    for one in space:
        if _applies(one, {**values, **own}):
            if not one.holds(values[one.path]):
                raise InputError(
                    f"search.space {one.path} does not hold the config's own value {values[one.path]!r}"
                    f" ({list(one.choices) or [one.low, one.high]})"
                )
            own[one.path] = values[one.path]
    return own


def default_grace(steps: int, eval_every_steps: int) -> int:
    """Return the steps before which no trial is stopped: a ninth of a run, in whole evaluations."""
    return min(steps, eval_every_steps * max(1, round(steps / 9 / eval_every_steps)))


# What a key needs to have any effect: (paths it looks at, whether it matters given their values).
NEEDED: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], bool]]] = {
    "train.learning_rate.text_encoder": (("train.freezing",), lambda values: trains_text(values["train.freezing"])),
    "train.learning_rate.denoiser": (
        ("train.freezing",),
        lambda values: not check_plan_name(values["train.freezing"])[0].startswith("text_encoder"),
    ),
    "train.momentum": (("train.optimizer",), lambda values: values["train.optimizer"] == "sgd"),
    "train.min_snr_gamma": (("train.weighting",), lambda values: values["train.weighting"] == "min_snr"),
}


def _applies(one: Dimension, values: Mapping[str, Any]) -> bool:
    if one.path in NEEDED and not NEEDED[one.path][1](values):
        return False
    return all(values.get(path) in allowed for path, allowed in one.when)


def _dimension(path: str, entry: dict[str, Any], known: Sequence[str]) -> Dimension:
    _check_path(path, known)
    when = entry.pop("when", {})
    if not isinstance(when, dict):
        raise InputError(f"search.space {path}: when expected {{path: [values]}}, found {when!r}")
    for asked in when:
        _check_known(asked, known)
    conditions = tuple((asked, tuple(v if isinstance(v, list) else [v])) for asked, v in when.items())
    if len(entry) != 1 or next(iter(entry)) not in KINDS:
        found = ", ".join(entry) or "nothing"
        raise InputError(f"search.space {path}: expected one of {', '.join(KINDS)}, found {found}")
    ((kind, given),) = entry.items()
    if kind == "choice":
        if not isinstance(given, list) or not given:
            raise InputError(f"search.space {path}: choice expected a list of values, found {given!r}")
        return Dimension(path, kind, choices=tuple(given), when=conditions)
    return Dimension(path, kind, *_range(path, kind, given), when=conditions)


def _range(path: str, kind: str, given: Any) -> tuple[float, float]:
    try:
        low, high = (float(end) for end in given)
    except (TypeError, ValueError):
        raise InputError(f"search.space {path}: {kind} expected [low, high], found {given!r}") from None
    if not low < high:
        raise InputError(f"search.space {path}: {kind} expected low < high, found the empty range {given!r}")
    if kind == "loguniform" and low <= 0:
        raise InputError(
            f"search.space {path}: loguniform expected low > 0, found {given!r}; start above 0 or use uniform"
        )
    if kind == "int" and (low != int(low) or high != int(high)):
        raise InputError(f"search.space {path}: int expected whole ends, found {given!r}")
    return low, high


def _check_path(path: str, known: Sequence[str]) -> None:
    if path.split(".")[0] == "placement":
        raise InputError(
            f"search.space {path}: placement never changes a result, so there is nothing to search; set it with --set"
        )
    _check_known(path, known)
    if path in REFUSED:
        raise InputError(f"search.space {path}: cannot be searched: {REFUSED[path]}")
    if path.split(".")[0] != "train":
        raise InputError(
            f"search.space {path}: only keys of train can be searched (trials share data, base and encodings)"
        )
    if any(key.startswith(path + ".") for key in known):
        raise InputError(f"search.space {path}: expected a key, found a section; name one of its keys")


def _check_known(path: str, known: Sequence[str]) -> None:
    if path not in known:
        near = difflib.get_close_matches(path, known, n=1, cutoff=0.0)
        raise InputError(f"search.space: key {path!r} is unknown; nearest key: {near[0]!r}")
