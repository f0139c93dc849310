"""How many new pictures are there to learn from and to judge by: before a cycle by hash, in it as `prepare` found them.

The split of a picture is a function of the hash of its bytes, which a look knows, so a training that the gate could not
judge is not even begun. Only `prepare` knows what cannot be used, and the rows of a table. What it counted in a cycle
that then waited for more pictures is remembered, so that the next cycle begins when enough others have come.
"""

from collections import Counter
from typing import Any

from cluster.artifacts import Workspace
from cluster.registry import TAG_DATASET, Version
from components.arrivals import Arrivals
from components.dataset import TEST, TRAIN, DatasetVersion, split_of
from components.enough import Enough
from flows import snapshot
from flows.config import Config

Contest = tuple[Version, DatasetVersion]
"""The champion and its data."""


def count_look(
    config: Config, workspace: Workspace, contest: Contest, seen: Arrivals, short: dict[str, Any] | None
) -> Enough:
    """Count what a cycle would begin with; `short` is what the last one that waited for more pictures had counted.

    StorageError when the arrivals of that cycle are gone.
    """
    tried: set[str] = set()
    splits: Counter[str] = Counter()
    fractions = _fractions(config)
    if short and (short["parent"], short["fractions"]) == (contest[1].id, fractions):
        tried = {snapshot.key_of(one) for one in snapshot.thaw(workspace, short["cycle"]).new}
        splits.update(short["splits"])
    rest = [one for one in seen.new if snapshot.key_of(one) not in tried]
    splits.update(split_of(one.sha256, *fractions) for one in rest if one.sha256)
    unsorted = sum(one.pictures for one in rest if not one.sha256)
    # A table that nobody examined may hold anything; after a cycle that found too few, chance must favour the next.
    share = config.data.test_fraction if tried else 1.0
    return _enough(config, contest, splits, unsorted, share)


def count_version(config: Config, contest: Contest, dataset: DatasetVersion) -> tuple[Enough, dict[str, Any]]:
    """Count what `dataset` has beyond the champion's data, and say what is to be remembered where it is too little."""
    known = {item.sha256 for item in contest[1].items}
    splits = Counter(item.split for item in dataset.items if item.sha256 not in known)
    short = {"parent": contest[1].id, "fractions": _fractions(config), "splits": dict(splits)}
    return _enough(config, contest, splits), short


def _enough(config: Config, contest: Contest, splits: Counter[str], unsorted: int = 0, share: float = 1.0) -> Enough:
    champion, parent = contest
    # Of a champion that names no data nothing is known: the gate takes every test picture for new (`flows.gather`).
    old = 0 if champion.tags.get(TAG_DATASET) else len(parent.split(TEST))
    least = config.gate.min_test_pictures
    return Enough(splits.total(), splits[TEST] + old, splits[TRAIN], least, unsorted, share)


def _fractions(config: Config) -> list[float]:
    return [config.data.validation_fraction, config.data.test_fraction]
