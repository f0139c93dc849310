"""`fresco monitor`: have the arrivals or the served prompts drifted from what the champion knows?

Pin the champion's reference where it is not pinned yet, bring the window up to date, and test, when the false-alarm
budget holds enough for a test and there is something new to test; else the verdict of the last test stands. What a test
spends is written down before its verdict is told. One lease: two monitors of a workspace look one after the other.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from cluster import stage
from cluster.artifacts import Workspace, append_journal, open_workspace, read_journal
from cluster.fencing import read_fenced, write_fenced
from cluster.lease import hold_lease
from cluster.registry import TAG_SINCE, Version
from components.dataset import DatasetVersion
from components.drift_streams import PROMPTS
from components.errors import InputError
from components.false_alarms import DAY_S, YEAR_S, Ledger, next_look
from components.schedule import FAR_AHEAD_S
from components.sources import EMBLEMS_SCHEME
from flows.compare_window import FEWEST, Sides, compare, nothing, numbers_of
from flows.config import Config, with_overrides
from flows.console import program, say, step
from flows.features import Eye, monitor_eye
from flows.monitor_report import attributions, explanations, write_report
from flows.reference import Reference, champion_data, champion_of, pin, told
from flows.served_prompts import Served, take_prompts
from flows.window import take_window

MONITOR = "monitor"
"""The journal's event."""
LEAST_LEVEL = 1 / 3650
"""A look with less budget does not test and saves it: its p-values would have to be tiny, at a great cost."""
FIRST_S = DAY_S
"""The first reference of a workspace begins with a day's budget."""
TTL_S, WAIT_S = 30.0, 600.0


def run(
    config: Config, wait: bool = False, at: float | None = None, cursor: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Look once; `wait` waits `monitor.settle_s` where all that is new may still be changing.

    `at` is the time of the look in Unix seconds (default: now); `cursor` that of a look which the caller made just now
    with `flows.arrivals.look`, so that no file has to come to rest twice. InputError and RegistryError where there is
    nothing to compare with, StorageError where the source does not answer or another monitor is at work for long.
    """
    workspace = open_workspace(config.workspace)
    _check_source(config)
    champion_data(config, workspace, champion_of(config, workspace))
    lease, state_at = (workspace.place(MONITOR, "looks", config.name, name) for name in ("lease", "state.json"))
    with hold_lease(lease, MONITOR, TTL_S, WAIT_S, notify=say) as confirm:
        champion = champion_of(config, workspace)  # it may have changed while another monitor was at work
        parent = champion_data(config, workspace, champion)
        step(f"monitor: {config.data.source} against {champion.uri} ({parent.id})")
        reference, eye = pin(config, champion.number), monitor_eye(config)
        config = with_overrides(config, {"data.resolution_px": reference.resolution_px})
        token = confirm().token
        state = read_fenced(state_at, token) or {}
        _finish_line(workspace, state)
        state = _state_for(reference, state)
        sides, at = _sides(config, workspace, eye, (champion, parent, reference), state, (wait, at, cursor))
        result, state = _look(config, workspace, eye, sides, state, at)
        if result["tested"] or result["verdict"] != state["told"]:
            line = {key: value for key, value in result.items() if key not in ("cursor", "attributions")}
            state |= {"told": result["verdict"], "line": {"name": config.name, **line}}
        write_fenced(state_at, state, confirm().token)
        _finish_line(workspace, state)
    _tell(config, workspace, result)
    return result


def plan(config: Config) -> list[str]:
    """Say what `run` would do."""
    section = config.monitor
    return [
        f"find the champion of {config.name} and pin its held-out pictures, unless they are pinned",
        f"list {config.data.source} and sample at most {section.window} of the pictures that its data lacks; examine"
        " and encode what is new in the sample",
        f"sample at most {section.window} of the prompts that the endpoint captured",
        f"compare {', '.join(section.streams)} and simple statistics, at a level that keeps all looks together below"
        f" {section.false_alarms_per_year:g} false alarms a year",
        "write the report, the budget spent and the journal's line",
    ]


def _check_source(config: Config) -> None:
    if config.data.source.startswith(EMBLEMS_SCHEME):
        raise InputError(
            f"data.source expected a folder or an s3:// prefix where pictures arrive, found {config.data.source!r},"
            " which never grows; name it with --set data.source=FOLDER (the champion's own data stays what it was)"
        )


def _state_for(reference: Reference, state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of this reference; from another reference's only the time of its last test is taken over."""
    if state.get("reference") == reference.sha256:
        return state
    last_s = state["ledger"]["last_s"] if state else reference.pinned_s - FIRST_S
    fresh: dict[str, Any] = dict.fromkeys(("last", "keys", "told", "line"))
    return {**fresh, "reference": reference.sha256, "ledger": asdict(Ledger(last_s)), "window": {}, "gone": 0}


def _finish_line(workspace: Workspace, state: dict[str, Any]) -> None:
    """Journal the last look that has something to tell, exactly once: also where a monitor was killed before it did."""
    line = state.get("line")
    if line and not any(line.items() <= one.items() for one in _lines(workspace, line["name"])):
        append_journal(workspace, MONITOR, **line)


def _lines(workspace: Workspace, name: str) -> list[dict[str, Any]]:
    return [line for line in read_journal(workspace) if line["event"] == MONITOR and line.get("name") == name]


def _sides(
    config: Config,
    workspace: Workspace,
    eye: Eye,
    champion: tuple[Version, DatasetVersion, Reference],
    state: dict[str, Any],
    how: tuple[bool, float | None, dict[str, Any] | None],
) -> tuple[Sides, float]:
    """Bring window and prompts up to date; return them with the time of the look."""
    (version, parent, reference), (wait, at, cursor) = champion, how
    seed = int(reference.sha256[:8], 16)
    now = time.time() if at is None else at
    window = take_window(config, workspace, parent, seed, state["window"], now, cursor)
    if wait and at is None and window.still_changing and not window.sample:
        pause_s = config.monitor.settle_s
        say(f"  {window.still_changing} new files may still be changing: looking again in {pause_s:.0f} s")
        time.sleep(pause_s)
        now = time.time()
        window = take_window(config, workspace, parent, seed, window.state, now)
    served = Served(None, {})
    if PROMPTS in config.monitor.streams:
        served = take_prompts(config, workspace, eye, seed, _since(version))
    return Sides(reference, window, served), now


def _since(version: Version) -> float:
    """When the version became champion, Unix seconds; 0 where nobody wrote it down."""
    since = version.tags.get(TAG_SINCE, "")
    try:
        return float(np.datetime64(since.removesuffix("Z")).astype("datetime64[s]").astype(float)) if since else 0.0
    except ValueError:
        return 0.0


def _look(
    config: Config, workspace: Workspace, eye: Eye, sides: Sides, state: dict[str, Any], at: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the result and the state after it."""
    ledger, ahead = _believed(Ledger(**state["ledger"]), at)
    state = {**state, "ledger": asdict(ledger)}
    level, after = next_look(ledger, at, config.monitor.false_alarms_per_year)
    numbers = {
        "looked_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at)),
        "new_images": sides.window.new_images,
        "reference": told(sides.reference),
        "cursor": sides.window.cursor,
        "window": {
            "pictures": len(sides.window.pictures),
            "rejected": len(sides.window.sample) - len(sides.window.pictures),
            "prompts": sides.num_prompts,
            "waiting": sides.window.waiting,
        },
    }
    # While pictures that a test saw are gone, its verdict is about something else, until the next test.
    state = {**state, "window": sides.window.state, "gone": state["gone"] + sides.window.gone}
    last = state["last"]
    why, stands = _why_no_test(config, sides, state, level, ledger, at)
    notes = [*ahead, *_notes(sides)]
    if why:
        kept = last if stands and last else nothing(config, sides)
        result = {**kept, **numbers, "reasons": [why, *kept["reasons"], *notes]}
        return result | {"tested": False, "level": 0.0, "spent": ledger.spent}, state
    found, compared = compare(config, workspace, eye, sides, level, ledger.looks)
    tested = any(one.p_value is not None for one in found.streams) or bool(found.statistics)
    spent = after if tested else ledger
    explained = explanations(found, compared)
    kept = numbers_of(found, config) | {"attributions": attributions(explained, compared)}
    result = {**kept, **numbers, "tested": tested, "spent": spent.spent, "reasons": [*found.reasons, *notes]}
    past = _lines(workspace, config.name)
    page = write_report(config, workspace, (found, compared, explained), result, past)
    kept["report"] = result["report"] = stage.portable(str(page), workspace.root)
    return result, {**state, "ledger": asdict(spent), "last": kept, "keys": _asked(config, sides), "gone": 0}


def _believed(ledger: Ledger, at: float) -> tuple[Ledger, list[str]]:
    """Return the ledger, and what to say where a clock that was far ahead wrote it: its time is not waited for."""
    if ledger.last_s <= at + FAR_AHEAD_S:
        return ledger, []
    then = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(ledger.last_s))
    note = f"the last test is dated {then}, by a clock that was ahead: the budget grows again from now on"
    return replace(ledger, last_s=at), [note]


def _why_no_test(
    config: Config, sides: Sides, state: dict[str, Any], level: float, ledger: Ledger, at: float
) -> tuple[str, bool]:
    """Say why nothing is tested, empty where it is; and whether the last test's verdict still stands."""
    window = sides.window
    pictures, prompts = len(window.pictures), sides.num_prompts
    if max(pictures, prompts) < FEWEST:
        told = f"{pictures} new pictures and {prompts} served prompts so far; a look compares from {FEWEST} on"
        return told, False
    if state["keys"] == _asked(config, sides):
        return "nothing has changed since the last test: its verdict stands", True
    if level >= LEAST_LEVEL:
        return "", False
    missing_s = (LEAST_LEVEL - level) * YEAR_S / config.monitor.false_alarms_per_year + max(0.0, ledger.last_s - at)
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at + missing_s))
    stands = state["last"] is not None and not state["gone"]
    what = "until then the last verdict stands" if stands else "nothing is decided until then"
    back = " (the clock stands before the last test)" if at < ledger.last_s else ""
    return f"the false-alarm budget holds too little for a test before {when}{back}; {what}", stands


def _asked(config: Config, sides: Sides) -> dict[str, Any]:
    """What a test depends on: the same again would only spend."""
    settings = config.monitor.model_dump(mode="json", exclude={"false_alarms_per_year", "settle_s"})
    return {**sides.keys, "settings": settings}


def _notes(sides: Sides) -> list[str]:
    """What a person must know about the window, whatever the verdict."""
    window, notes = sides.window, []
    if window.waiting:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(window.waiting.items()))
        notes.append(f"{sum(window.waiting.values())} files are no arrivals yet: {reasons}")
    if window.gone:
        notes.append(f"{window.gone} pictures of the sample are gone from the source and count no more")
    if window.counts["missing"]:
        missing = f"{window.counts['missing']} files of the champion's data are gone from the source or were replaced"
        notes.append(f"{missing}; its dataset version keeps them")
    if window.counts["later"]:
        notes.append(f"{window.counts['later']} new files are left for the next look")
    notes += [
        f"{count} captured prompts were encoded by {encoder}, the reference by {sides.reference.encoder}: left out"
        for encoder, count in sides.served.refused.items()
    ]
    return notes


def _tell(config: Config, workspace: Workspace, result: Mapping[str, Any]) -> None:
    heads = {"drift": "DRIFT", "no_drift": "no drift", "not_enough_data": "not enough data"}
    say(f"\nverdict: {heads[result['verdict']]}")
    for reason in result["reasons"]:
        say(f"  {reason}")
    reference = result["reference"]
    say(
        f"new pictures: {result['new_images']}; reference: version {reference['version']}, {reference['dataset']};"
        f" false alarms to be expected so far: {result['spent']:.3g} of {config.monitor.false_alarms_per_year:g} a year"
    )
    if result["report"]:
        say(
            f"report: {stage.here(result['report'], workspace.root)}"
            + ("" if result["tested"] else " (of the last test)")
        )
    if result["verdict"] == "drift":
        say(f"next: look at the report, then: {program()} retrain --once --workspace {config.workspace}")
    else:
        say("next: the same command, when more has arrived")
