"""A champion, its data and what has arrived since, in; the config of the run that continues the champion, out.

A continuation starts from the champion's exported (averaged) weights, warms the learning rate up and lets it fall anew,
trains on the new pictures, and replays a share of the old ones that grows with the measured drift. Every few cycles an
anchor starts from `model.base` on everything instead, so that small losses cannot pile up. Nothing is trained or
decided here. Why so: docs/decisions.md; what each choice costs and gains: `make bench-replay`.
"""

import hashlib

from components.dataset import DatasetVersion
from components.standing import RetrainSection
from flows.config import Config, with_overrides
from flows.models import ResolvedModel
from flows.replay import check_parts

WARMUP_SHARE = 10
"""The warm-up takes at most one in so many steps: a short continuation still reaches its peak rate, and falls."""


def continued(
    config: Config, champion: ResolvedModel, parent: DatasetVersion, dataset: DatasetVersion, drift: float, cycle: int
) -> Config:
    """Return the config whose `flows.train.run` is the training of cycle `cycle` (counted from 1).

    `parent` is the champion's data, `dataset` what it grew into, `drift` in [0, 1] what the monitor measured.
    InputError when `dataset` has no new training picture. Of equal arguments comes an equal config, so a repeated cycle
    finds its run again; another dataset gets other random draws.
    """
    shared = {"data.version": dataset.id, "train.seed": seed_of(config.train.seed, dataset)}
    if is_anchor(config.retrain, cycle):
        alone = {"train.replay_of": "", "train.replay_fraction": 0.0, "train.average_with_base": 0.0}
        return with_overrides(config, {**shared, **alone})
    steps = config.retrain.steps or config.train.steps
    continuation = {
        "model.base": str(champion.directory),
        "train.steps": steps,
        "train.warmup_steps": min(config.train.warmup_steps, steps // WARMUP_SHARE),
        "train.replay_of": parent.id,
        "train.replay_fraction": replay_share(config.retrain, drift),
        "train.average_with_base": config.retrain.average_with_champion,
    }
    found = with_overrides(config, {**shared, **continuation})
    check_parts(found, parent, dataset)
    return found


def is_anchor(retrain: RetrainSection, cycle: int) -> bool:
    """Whether a cycle (counted from 1) starts from the base on everything instead of from the champion."""
    return retrain.anchor_every > 0 and cycle % retrain.anchor_every == 0


def search_due(retrain: RetrainSection, searched: int, turn: int) -> bool:
    """Whether turn `turn` (counted from 1) searches the recipe, when turn `searched` did so last (0: none)."""
    return retrain.search_every > 0 and (not searched or turn - searched >= retrain.search_every)


def replay_share(retrain: RetrainSection, drift: float) -> float:
    """Return the share of old pictures at a measured drift in [0, 1], to three digits: it is typed and read."""
    drift = min(max(drift, 0.0), 1.0)
    return round(retrain.replay_fraction + drift * (retrain.most_replay_fraction - retrain.replay_fraction), 3)


def seed_of(seed: int, dataset: DatasetVersion) -> int:
    """Return the key of a run's random draws: two continuations in a row must not see the same noise."""
    digest = hashlib.sha256(f"{seed} {dataset.fingerprint}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
