"""One comparison of the window with the champion's reference, and its numbers as the journal and the JSON tell them.

Both sides are brought into the form that `components/drift.py` compares. With too few arrivals and enough prompts, the
prompts alone are compared. What a comparison costs of the false-alarm budget is `flows.monitor`'s matter.
"""

from dataclasses import dataclass
from typing import Any

from cluster.artifacts import Workspace
from components.drift import DriftSettings, Look, Untested, look
from components.drift_items import item_table, make_items, with_near_duplicates
from components.drift_streams import PROMPTS, Items, Texts
from flows.config import Config
from flows.console import say
from flows.features import Eye, ensure_features
from flows.reference import Reference
from flows.served_prompts import Served
from flows.window import Window

FEWEST = 20
"""Arrivals, or prompts, from which on they are compared at all."""


@dataclass(frozen=True)
class Compared:
    """Both sides as they were compared; `*_keys` are the sha256 of the pictures, in their order."""

    reference: Items
    arrivals: Items
    reference_keys: list[str]
    arrival_keys: list[str]


@dataclass(frozen=True)
class Sides:
    """What one look can compare."""

    reference: Reference
    window: Window
    served: Served

    @property
    def keys(self) -> dict[str, list[int]]:
        return {"window": sorted(one.key for one in self.window.sample), "prompts": sorted(self.served.keys)}

    @property
    def num_prompts(self) -> int:
        return len(self.served.keys)


def compare(
    config: Config, workspace: Workspace, eye: Eye, sides: Sides, level: float, looks: int
) -> tuple[Look, Compared]:
    """Test the streams that the config names at this level; `looks` made before choose the seed."""
    section, pictures = config.monitor, [one.picture for one in sides.window.pictures]
    table, known = sides.reference.read()
    table = table.slice(0, section.window)  # in the order of hashes, so a part is a uniform sample
    reference = make_items(table, eye.identity, known, sides.reference.rejected_flags())
    prompts = sides.served.texts if sides.num_prompts >= FEWEST else None
    untested = _untested(config, sides)
    left_out = {one.stream for one in untested}
    streams = tuple(name for name in section.streams if name not in left_out)
    if len(pictures) >= FEWEST:
        job = ensure_features(
            config, workspace, eye, {one.sha256 for one in pictures}, {one.caption for one in pictures}
        )
        rejected = [float(bool(one.reason)) for one in sides.window.sample]
        arrivals = make_items(item_table(pictures, job), eye.identity, known, rejected, prompts)
        reference, arrivals = with_near_duplicates(reference, arrivals)
    else:
        pictures = []
        arrivals = _prompts_alone(reference, prompts)
    settings = DriftSettings(
        section.smallest_concept,
        section.smallest_mismatch,
        section.power,
        section.smallest_effect,
        section.window,
        streams,
    )
    say(f"  comparing {len(reference)} pictures of the reference with {len(arrivals)} arrivals at level {level:.2g}")
    found = look(reference, arrivals, level, int(sides.reference.sha256[8:16], 16) + looks, settings, untested)
    return found, Compared(reference, arrivals, table["sha256"].to_pylist(), [one.sha256 for one in pictures])


def _untested(config: Config, sides: Sides) -> tuple[Untested, ...]:
    """The streams that were asked for and have too little to compare, with what they have."""
    pictures, prompts = len(sides.window.pictures), sides.num_prompts
    found = []
    for name in config.monitor.streams:
        count, what = (prompts, "served prompts") if name == PROMPTS else (pictures, "new pictures")
        if count < FEWEST:
            why = f"{count} {what} so far; a look compares from {FEWEST} on"
            found.append(Untested(name, sides.reference.size, count, why))
    return tuple(found)


def _prompts_alone(reference: Items, prompts: Texts | None) -> Items:
    """The arrivals' side where there are prompts and no pictures to speak of."""
    rows, small = reference.picture_rows_ND[:0], reference.thumbnails_ND[:0]
    return Items(reference.encoder, rows, small, Texts((), reference.captions.rows_ND[:0]), {}, prompts)


def numbers_of(found: Look, config: Config) -> dict[str, Any]:
    """The look as the JSON tells it. `threshold` is the level that a stream's p-value must not exceed."""
    streams: dict[str, dict[str, Any]] = {
        one.stream: {
            "p_value": one.p_value,
            "effect": one.effect,
            "threshold": one.level,
            "n_reference": one.num_reference,
            "n_window": one.num_arrivals,
            "verdict": one.verdict,
            "smallest_effect": config.monitor.smallest_effect,
            "auroc": [one.auroc.value, one.auroc.low, one.auroc.high] if one.auroc else None,
            "needed": one.needed,
        }
        for one in found.streams
    }
    streams |= {one.stream: {**_lacking(one.num_reference, one.num_arrivals), "why": one.why} for one in found.untested}
    statistics = {
        one.name: {
            "p_value": one.p_value,
            "adjusted": one.adjusted,
            "reference": one.reference,
            "window": one.arrivals,
            "effect": one.effect,
        }
        for one in found.statistics
    }
    effects = [one.effect or 0.0 for one in found.streams if one.verdict == "drift"]
    drift = min(1.0, max(effects, default=0.0))
    return {
        "verdict": found.verdict,
        "reasons": list(found.reasons),
        "streams": streams,
        "statistics": statistics,
        "drift": drift,
        "level": found.level,
    }


def _lacking(num_reference: int, num_arrivals: int) -> dict[str, Any]:
    """The numbers of a stream that was not tested."""
    numbers = {"n_reference": num_reference, "n_window": num_arrivals}
    return {"p_value": None, "effect": None, "threshold": None, **numbers, "verdict": "not_enough_data"}


def nothing(config: Config, sides: Sides) -> dict[str, Any]:
    """The numbers of a look that could not test anything."""
    pictures, prompts = len(sides.window.pictures), sides.num_prompts
    streams = {
        name: _lacking(sides.reference.size, prompts if name == PROMPTS else pictures)
        for name in config.monitor.streams
    }
    return {
        "verdict": "not_enough_data",
        "reasons": [],
        "streams": streams,
        "statistics": {},
        "drift": 0.0,
        "attributions": {},
        "report": "",
    }
