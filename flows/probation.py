"""A new version on probation: tried on a share of the traffic before it is champion, watched for a while afterwards.

`try_out` comes between the gate's verdict and the move of the alias, `watch` after it. Both read the running endpoint's
metrics, compare the new version with the former one (`components/probation.py`) and return a decision with its numbers.
Neither moves champion or previous: whoever asked does so. Without an endpoint or without requests nothing is shown, and
that is said.
"""

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from cluster.artifacts import open_workspace
from cluster.champion import trying
from cluster.endpoint_numbers import (
    FAILURES,
    Look,
    counted_between,
    draws_everywhere,
    is_drained,
    look_at,
    numbers_of,
)
from cluster.errors import ChallengerBusyError, StorageError
from cluster.proxy_face import ASLEEP
from cluster.registry import Registry
from cluster.serving import APPLICATION, readiness
from components.probation import Decay, Judgement, Limits, Numbers, Verdict, judge
from flows.config import Config
from flows.console import say
from flows.serve import endpoint_of

LOOKS = 10
"""In the time of a watch; each spends its part of the significance, so that a broken version is seen early."""
POLL_S = 0.5
TRAFFIC_SHARE = 0.1
"""Of `retrain.watch_s`: if no request ends for so long there is no traffic, and nothing is tried."""
SILENT = "it does not answer"
ENDED = "the endpoint was ended"
OF_CHALLENGER = "the challenger"
"""In the error of a challenger that could not be loaded, which says nothing about the champion."""
KEEP: Verdict = "keep"
ROLL_BACK: Verdict = "roll_back"
TOO_FEW: Verdict = "not_enough_requests"

Notify = Callable[[str], None]


def look(config: Config) -> Look | None:
    """Look at the endpoint, for `since`; None where none runs. `dataclasses.asdict` makes plain values of it."""
    endpoint = endpoint_of(open_workspace(config.workspace))
    return None if endpoint is None else _look(config, endpoint["url"])


def since(config: Config, begin: Look | None) -> dict[str, Any] | None:
    """Return what the champion did since a look: what `watch` takes as `before`. Call it before the alias moves.

    A loop does so in the function that it gives to `promote.run` as `tryout`, where it calls `try_out` as well.
    """
    end = look(config)
    if begin is None or end is None:
        return None
    return numbers_of("champion", counted_between(begin, end))


def watch(
    config: Config,
    version: int,
    before: dict[str, Any] | None = None,
    notify: Notify = say,
    decay: Callable[[], Decay | None] = lambda: None,
) -> dict[str, Any]:
    """Watch the new champion for `retrain.watch_s`; `before` is what the former one did, None where that is not known.

    `decay` is asked once, at the end: losses of both versions on pictures that came since the gate decided.

    Returns {"decision": keep, roll_back or not_enough_requests, "reasons", "numbers": {"before", "after", "checks"}}.
    """
    watch_s = config.retrain.watch_s
    endpoint = endpoint_of(open_workspace(config.workspace))
    if not watch_s or endpoint is None:
        return _told(KEEP, "retrain.watch_s is 0" if not watch_s else "no endpoint runs", "nothing was watched")
    notify(f"watching version {version} at {endpoint['url']} for {watch_s:g} s")
    if _look(config, endpoint["url"]) is None:  # that is its address, or its keys, and says nothing of the version
        return _told(TOO_FEW, f"the metrics of {endpoint['url']} cannot be read", "nothing was watched")
    problem = _wait_until_drawn(config, endpoint["url"], "champion", version)
    if problem:
        return _told(TOO_FEW if problem == ENDED else ROLL_BACK, problem)
    return _compare(config, endpoint["url"], ("", "champion"), before, decay)


def try_out(config: Config, version: int, notify: Notify = say) -> dict[str, Any]:
    """Let `version` answer `retrain.canary_share` of the requests for `retrain.watch_s` beside the champion.

    Returns what `watch` returns; `numbers["before"]` is what the champion did meanwhile: `before` of a later `watch`.
    The alias `challenger` and the share are taken away whatever happens; a challenger set by hand is left alone.
    """
    share, watch_s = config.retrain.canary_share, config.retrain.watch_s
    workspace = open_workspace(config.workspace)
    endpoint = endpoint_of(workspace)
    if not share or not watch_s:
        return _told(KEEP, "retrain.canary_share or retrain.watch_s is 0", "nothing was tried")
    if endpoint is None or endpoint["model_version"] is None:
        return _told(KEEP, "no endpoint runs", "nothing was tried")
    url = endpoint["url"]
    if not _has_traffic(config, url, watch_s * TRAFFIC_SHARE):
        return _told(TOO_FEW, f"no request ended in {watch_s * TRAFFIC_SHARE:g} s", "nothing was tried")
    with ExitStack() as tried:
        try:
            registry = Registry(workspace, config.placement.tracking_uri)
            tried.enter_context(trying(registry, config.name, version, share))
        except (ChallengerBusyError, StorageError) as error:
            return _told(KEEP, str(error), "nothing was tried")
        notify(f"version {version} answers {share:.0%} of requests at {url} for {watch_s:g} s")
        problem = _wait_until_drawn(config, url, "challenger", version)
        if problem:  # memory for two may be missing, which says nothing about the version
            return _told(TOO_FEW, problem, "nothing was tried")
        return _compare(config, url, ("champion", "challenger"), None, lambda: None)


def _compare(
    config: Config,
    url: str,
    roles: tuple[str, str],
    before: dict[str, Any] | None,
    decay: Callable[[], Decay | None],
) -> dict[str, Any]:
    """Look LOOKS times; the first that shows the new version to be worse ends it. `roles` are (former, new)."""
    section, gate = config.retrain, config.gate
    limits = Limits(section.max_error_share, section.max_slowdown, gate.significance, gate.max_forgetting, looks=LOOKS)
    start, begin, silent = time.monotonic(), _look(config, url), 0
    found = Judgement(TOO_FEW, ("the endpoint did not answer when it was looked at",), ())
    after = Numbers()
    for turn in range(1, LOOKS + 1):
        _sleep_until(start + section.watch_s * turn / LOOKS)
        if endpoint_of(open_workspace(config.workspace)) is None:
            return _told(TOO_FEW, "the endpoint was ended while it was watched")
        state, error = _state(url)
        silent = silent + 1 if state in (SILENT, "failed") else 0
        if silent > 1:
            return _told(ROLL_BACK, f"the endpoint serves no more: {error or state}")
        end = _look(config, url)
        if begin is None or end is None:
            begin = begin or end
            continue
        counts = counted_between(begin, end)
        if roles[0]:
            before = numbers_of(roles[0], counts)
        after = Numbers(**numbers_of(roles[1], counts))
        found = judge(None if before is None else _numbers(before), after, limits, decay() if turn == LOOKS else None)
        if found.decision == ROLL_BACK:
            break
    numbers = {"before": before, "after": asdict(after), "checks": [asdict(check) for check in found.checks]}
    return {"decision": found.decision, "reasons": list(found.reasons), "numbers": numbers}


def _wait_until_drawn(config: Config, url: str, role: str, version: int) -> str:
    """Wait until every replica has the version in its role and the rows of those before are finished; why not, else.

    The limit is that of an endpoint to become ready, once for each replica: those of one machine load in turns. Rows
    that take longer are waited for no more.
    """
    limit_s = config.serve.ready_limit_s * config.serve.max_replicas
    start, begin = time.monotonic(), _look(config, url)
    drawn = False
    while time.monotonic() - start < limit_s:
        now, (state, error) = _look(config, url), _state(url)
        drawn = now is not None and draws_everywhere(now, role, version)
        if state == ASLEEP or (now is not None and drawn and is_drained(now)):
            return ""  # what sleeps loads the new version when somebody asks
        of_another = role == "champion" and OF_CHALLENGER in error
        if now is not None and begin is not None and not drawn and not of_another and _failed_to_load(begin, now):
            return f"version {version} could not be loaded: {error or 'the log of the endpoint says why'}"
        if endpoint_of(open_workspace(config.workspace)) is None:
            return ENDED
        threading.Event().wait(POLL_S)
    waited = f"within {limit_s:.0f} s"
    return "" if drawn else f"not every replica draws with version {version} as {role} {waited}"


def _failed_to_load(begin: Look, now: Look) -> bool:
    return any(value > 0 for key, value in counted_between(begin, now).items() if key == FAILURES)


def _has_traffic(config: Config, url: str, wait_s: float) -> bool:
    begin, deadline = _look(config, url), time.monotonic() + wait_s
    while begin is not None:
        now = _look(config, url)
        if now is not None and numbers_of("champion", counted_between(begin, now))["requests"]:
            return True
        if time.monotonic() >= deadline:
            return False
        threading.Event().wait(min(POLL_S, wait_s))
    return False


def _state(url: str) -> tuple[str, str]:
    """Return what /readyz says: the state, and why the endpoint does not draw with what it should."""
    status = readiness(url)
    return (SILENT, "") if status is None else (status["status"], str(status.get("error") or ""))


def _look(config: Config, url: str) -> Look | None:
    return look_at(url, open_workspace(config.workspace).root / "serving" / APPLICATION / "metrics")


def _numbers(written: dict[str, Any]) -> Numbers:
    """Of plain values, perhaps read from JSON."""
    sums = {name: (pair[0], pair[1]) for name, pair in written["sums"].items()}
    edges, times = tuple(written["edges_s"]), tuple(written["times"])
    return Numbers(**{**written, "sums": sums, "edges_s": edges, "times": times})


def _told(decision: str, *reasons: str) -> dict[str, Any]:
    return {"decision": decision, "reasons": [": ".join(reasons)], "numbers": {}}


def _sleep_until(moment: float) -> None:
    threading.Event().wait(max(0.0, moment - time.monotonic()))
