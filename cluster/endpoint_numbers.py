"""What has a running endpoint done so far, and what since an earlier look? Its metrics, read and subtracted.

They come from /metrics, or, where that asks for a key, from the files in which each replica leaves them. Counters are
subtracted replica by replica: one that started in between began at zero, and one that ended took its share with it.
"""

import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from cluster.metric_files import FORGET_S, SUFFIX, merge
from cluster.role_metrics import STATISTICS, STEP_BUCKETS_S

LIMIT_S = 10.0
STEP_TIMES = "fresco_role_step_seconds_bucket"
VERSION = "fresco_role_version"
LOADED = "fresco_version_requests"
FAILURES = "fresco_swap_failures_total"
COUNTERS = ("fresco_denoise_seconds_total", "fresco_row_steps_total", FAILURES)
KEY_NEEDED = (401, 403)

Counts = dict[str, float]
"""Name and labels of a series, without its replica -> value."""


@dataclass(frozen=True)
class Look:
    """All replicas at one time; plain values, which may be written down and read again."""

    at: float
    """Unix seconds."""
    counters: Mapping[str, Counts]
    """Of each replica."""
    roles: Mapping[str, Mapping[str, str]]
    """Of each replica: role -> version that has it now."""
    loaded: Mapping[str, tuple[str, ...]]
    """Of each replica: the engine's names of the versions in memory, such as "4 (2)"."""


def look_at(url: str, folder: Path) -> Look | None:
    """Read an endpoint's metrics; `folder` is where its replicas leave them. None when nothing can be read."""
    text = _scrape(url, folder)
    return None if text is None else parse(text)


def parse(text: str) -> Look:
    """Return what an exposition says of roles, versions and the engine."""
    counters: dict[str, Counts] = {}
    roles: dict[str, dict[str, str]] = {}
    loaded: dict[str, tuple[str, ...]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            replica = labels.pop("replica", "")
            if sample.name == VERSION:
                roles.setdefault(replica, {})[labels["role"]] = labels["version"]
            elif sample.name == LOADED:
                loaded[replica] = (*loaded.get(replica, ()), labels["version"])
            elif sample.name.startswith("fresco_role_") or sample.name in COUNTERS:
                counters.setdefault(replica, {})[_key(sample.name, labels)] = sample.value
    return Look(time.time(), counters, roles, loaded)


def counted_between(begin: Look, end: Look) -> Counts:
    """Return how much each counter grew, of all replicas together."""
    found: Counts = {}
    for replica, counters in end.counters.items():
        before = begin.counters.get(replica, {})
        for key, value in counters.items():
            found[key] = found.get(key, 0.0) + max(0.0, value - before.get(key, 0.0))
    return found


def numbers_of(role: str, counts: Counts) -> dict[str, Any]:
    """Return what a role did, in plain numbers: requests, errors, times per step, pictures and their statistics."""

    def count(name: str, **labels: str) -> float:
        return counts.get(_key(f"fresco_role_{name}", {"role": role, **labels}), 0.0)

    done, failed = (int(count("requests_total", outcome=outcome)) for outcome in ("done", "failed"))
    bounds = [*(str(float(bound)) for bound in STEP_BUCKETS_S), "+Inf"]
    reached = [int(count("step_seconds_bucket", le=bound)) for bound in bounds]
    row_steps = counts.get(_key("fresco_row_steps_total", {}), 0.0)
    return {
        "requests": done + failed,
        "errors": failed,
        "edges_s": STEP_BUCKETS_S,
        "times": tuple(after - before for before, after in zip([0, *reached], reached, strict=False)),
        "row_step_s": counts.get(_key("fresco_denoise_seconds_total", {}), 0.0) / row_steps if row_steps else None,
        "pictures": int(count("pictures_total")),
        "refused": int(count("refused_pictures_total")),
        "sums": {name: (count(f"{name}_total"), count(f"{name}_squared_total")) for name in STATISTICS},
    }


def draws_everywhere(look: Look, role: str, version: int) -> bool:
    """Whether every replica has a version in a role, and there is a replica."""
    return bool(look.roles) and all(roles.get(role) == str(version) for roles in look.roles.values())


def is_drained(look: Look) -> bool:
    """Whether no replica has a version in memory that has no role: the rows of those before are finished."""
    return all(
        name.split(" ")[0] in look.roles.get(replica, {}).values()
        for replica, names in look.loaded.items()
        for name in names
    )


def _scrape(url: str, folder: Path) -> str | None:
    import httpx

    try:
        answer = httpx.get(f"{url}/metrics", timeout=LIMIT_S, trust_env=False)
    except httpx.HTTPError:
        return None
    if answer.status_code in KEY_NEEDED:
        return _from_files(folder.glob(f"*{SUFFIX}"))
    return answer.text if answer.status_code == 200 else None


def _from_files(paths: Iterable[Path]) -> str | None:
    """Put together what replicas left; a file much older than the newest is of one that has ended."""
    found: list[tuple[float, str]] = []
    for path in paths:
        with suppress(OSError):  # it ended while we read
            found.append((path.stat().st_mtime, path.read_text("utf-8")))
    newest = max((at for at, _ in found), default=0.0)
    texts = [text for at, text in found if newest - at < FORGET_S]
    return merge(texts).decode() if texts else None


def _key(name: str, labels: Mapping[str, str]) -> str:
    return " ".join([name, *(f"{label}={value}" for label, value in sorted(labels.items()))])
