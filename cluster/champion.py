"""Who serves, since when, on what evidence: the aliases of a model move here, and only here.

MLflow's aliases are last-writer-wins and keep no history. So each move holds the workspace's lock, writes down what it
is about to do (the intent, with the whole journal line), moves `previous` before `champion`, reads both again, appends
the line to the journal, and removes the intent. Whoever comes after a crash finds the intent and finishes or undoes it.
A move can name the champion it was decided against: if that one was replaced meanwhile, nothing moves.
`challenger` is what is tried on traffic on purpose; a version that became champion is tried no more.
"""

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import stage
from cluster.artifacts import append_journal, read_journal, read_json, write_json_atomic
from cluster.canary import Trial, end_trial, hold_trial, is_tried, read_trial, trial_lives, write_trial
from cluster.errors import ChallengerBusyError, ChampionMovedError, RegistryError, StorageError
from cluster.judging import judged_now
from cluster.lease import hold_lease, read_lease
from cluster.registry import CHALLENGER, CHAMPION, PREVIOUS, TAG_RETIRED, TAG_SINCE, Registry, Version
from cluster.reigns import FOUND, PROMOTE, ROLLBACK, is_move

Notify = Callable[[str], None]
Proof = Callable[[], object]
"""Raises where who asked for a move may not move anything any more, such as a loop that lost its lease."""
RETIRE, CHALLENGE = "retire", "challenger"
NO_CHAMPION = 0
"""As `expected`: the move was decided when there was no champion."""
SETTLE_WAIT_S = 2.0


@dataclass(frozen=True)
class Move:
    """The aliases after a move; `changed` is false when the version was the champion already."""

    champion: Version
    previous: Version | None
    changed: bool


def move_champion(
    registry: Registry,
    name: str,
    number: int,
    line: Mapping[str, Any] | None = None,
    expected: int | None = None,
    notify: Notify | None = None,
    proof: Proof = lambda: None,
) -> Move:
    """Make a version the champion and the old champion `previous`; `line` is what the journal shall say beside that.

    ChampionMovedError when the champion is not `expected` any more (0: none); None moves whatever is there. `proof` is
    asked under the lock, before anything is written and again before the champion changes.
    """
    with _aliases(registry, name, f"promote version {number}", notify) as confirm:
        wanted, old = registry.by_number(name, number), registry.by_alias(name, CHAMPION)
        if old is not None and old.number == number:
            return Move(old, registry.by_alias(name, PREVIOUS), changed=False)
        found = old.number if old else NO_CHAMPION
        if expected not in (None, found):
            raise ChampionMovedError(
                f"champion of {name} expected to be {expected or 'unset'} as it was when version {number} was measured,"
                f" found {found}: another promotion came first; promote again to be compared with that one"
            )
        return _move(registry, wanted, old, {"event": PROMOTE, "decision": "promote", **(line or {})}, (confirm, proof))


def roll_back(
    registry: Registry,
    name: str,
    line: Mapping[str, Any],
    notify: Notify | None = None,
    expected: int | None = None,
    proof: Proof = lambda: None,
) -> Move:
    """Make `previous` the champion again, and the champion `previous`: a second roll-back undoes the first.

    ChampionMovedError where the champion is not the `expected` version; `proof` as in `move_champion`.
    """
    with _aliases(registry, name, "rollback", notify) as confirm:
        old, wanted = registry.by_alias(name, CHAMPION), registry.by_alias(name, PREVIOUS)
        found = old.number if old else NO_CHAMPION
        if expected not in (None, found):
            raise ChampionMovedError(
                f"rollback expected version {expected} to be the champion of {name}, found {found or 'none'}: it was"
                " moved meanwhile; nothing was changed"
            )
        if old is None or wanted is None:
            have = f"champion {old.number} without a previous one" if old else "no champion"
            raise RegistryError(
                f"rollback expected a previous champion of {name} in {registry.uri}, found {have}; promote a version"
                f" with: fresco promote models:/{name}/NUMBER"
            )
        registry.directory_of(wanted)  # a version whose files are gone must not become what serves
        return _move(registry, wanted, old, {"event": ROLLBACK, **line}, (confirm, proof))


def set_challenger(
    registry: Registry, name: str, number: int | None, reasons: Sequence[str] = (), notify: Notify | None = None
) -> Version | None:
    """Try a version on traffic beside the champion, or none for None; journaled. Returns the challenger before.

    RegistryError for the champion itself, and for a version that is not there.
    """
    with _aliases(registry, name, "challenger", notify):
        before = registry.by_alias(name, CHALLENGER)
        if number is not None:
            _check_challenger(registry, name, number)
        if number != (before.number if before else None):
            registry.set_alias(name, CHALLENGER, number)
            append_journal(registry.workspace, CHALLENGE, name=name, version=number, reasons=list(reasons))
        return before


@contextmanager
def trying(registry: Registry, name: str, number: int, share: float) -> Iterator[None]:
    """Let a version answer a share of the requests for the block, as challenger; afterwards it is one no more.

    ChallengerBusyError, and nothing touched, where another version is the challenger. LeaseLostError where another
    process tries versions by now, because this one did not answer for long: what that one tries stays as it is.
    """
    with hold_trial(registry, name, number) as proof:
        with _aliases(registry, name, "canary", None):
            proof()
            end_trial(registry, name)  # the lease is ours, so whoever wrote it is gone
            _check_challenger(registry, name, number)
            other = registry.by_alias(name, CHALLENGER)
            if other is not None:
                raise ChallengerBusyError(f"version {other.number} is the challenger of {name} already, set by hand")
            write_trial(registry, name, Trial(number, share))
            registry.set_alias(name, CHALLENGER, number)
            append_journal(registry.workspace, CHALLENGE, name=name, version=number, share=share, reasons=["canary"])
        try:
            yield
        finally:
            with _aliases(registry, name, "canary", None):
                proof()
                end_trial(registry, name)
                append_journal(registry.workspace, CHALLENGE, name=name, version=None, reasons=["the canary ended"])


def drop_challenger(registry: Registry, name: str, number: int, reasons: Sequence[str]) -> bool:
    """Take the alias from a version that was refused; another challenger stays. Returns whether it was this one."""
    with _aliases(registry, name, "challenger", None):
        challenger = registry.by_alias(name, CHALLENGER)
        if challenger is None or challenger.number != number:
            return False
        registry.set_alias(name, CHALLENGER, None)
        append_journal(registry.workspace, CHALLENGE, name=name, version=None, reasons=list(reasons))
        return True


def settle(registry: Registry, name: str) -> list[str]:
    """Repair what a crash or a stranger left, and say what was repaired; whoever holds the lock now is left alone.

    An intent whose champion was reached gets its journal line; one that was not is undone. A champion that no line
    tells of (an alias moved by other tools, a journal that was lost) gets a line that says so. A challenger that is the
    champion is one no more, and so is one that a process tried which is gone.
    """
    if not _unsettled(registry, name) or read_lease(registry.lock_path(name)) is not None:
        return []
    try:
        with hold_lease(registry.lock_path(name), "repair", wait_s=SETTLE_WAIT_S):
            return _settle(registry, name)
    except StorageError:
        return []  # another command was faster, and repairs it itself


def retire(registry: Registry, name: str, keep: int, also: Sequence[int] = ()) -> list[Version]:
    """Mark versions without alias that are not judged now, in `also` or among the last `keep`; return those marked.

    Only a mark: the registry keeps its entry and the workspace its files.
    """
    with _aliases(registry, name, "retention", None):
        aliased = [registry.by_alias(name, alias) for alias in (CHAMPION, PREVIOUS, CHALLENGER)]
        kept = {version.number for version in aliased if version is not None} | set(also)
        kept |= set(judged_now(registry, name))
        others = [version for version in registry.versions(name) if version.number not in kept]
        retired = others[: len(others) - keep] if keep < len(others) else []
        for version in retired:
            if not version.tags.get(TAG_RETIRED):
                registry.tag(version, {TAG_RETIRED: now()})
        return retired


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@contextmanager
def _aliases(registry: Registry, name: str, owner: str, notify: Notify | None) -> Iterator[Callable[[], Any]]:
    """Hold the lock of a model's aliases with everything earlier settled; yields the proof that it is still held."""
    with hold_lease(registry.lock_path(name), owner, notify=notify) as confirm:
        for repair in _settle(registry, name):
            if notify is not None:
                notify(repair)
        yield confirm


def _move(
    registry: Registry, wanted: Version, old: Version | None, line: Mapping[str, Any], proofs: Sequence[Proof]
) -> Move:
    """Intent, previous, champion, challenger, journal, in this order; the caller holds the lock, as `proofs` prove."""
    name, since = wanted.name, now()
    before = registry.by_alias(name, PREVIOUS)
    to = {"champion": wanted.number, "previous": old.number if old else (before.number if before else None)}
    whole = {**line, "name": name, **to, "since": since, "move": uuid.uuid4().hex}
    intent = {
        "line": whole,
        "previous_before": before.number if before else None,
    }
    for proof in proofs:
        proof()
    write_json_atomic(_intent_path(registry, name), intent)
    registry.set_alias(name, PREVIOUS, to["previous"])
    registry.tag(wanted, {TAG_SINCE: since} | ({TAG_RETIRED: ""} if wanted.tags.get(TAG_RETIRED) else {}))
    for proof in proofs:
        proof()
    registry.set_alias(name, CHAMPION, wanted.number)
    if is_tried(registry, wanted):
        registry.set_alias(name, CHALLENGER, None)
    _journal(registry, whole)
    stage.remove(_intent_path(registry, name))
    champion, previous = registry.by_alias(name, CHAMPION), registry.by_alias(name, PREVIOUS)
    assert champion is not None
    return Move(champion, previous, changed=True)


def _settle(registry: Registry, name: str) -> list[str]:
    """Do the repairs of `settle`; the caller holds the lock."""
    said, path = [], _intent_path(registry, name)
    intent = read_json(path)
    champion = registry.by_alias(name, CHAMPION)
    number = champion.number if champion else None
    if intent is not None:
        line = intent["line"]
        if number == line["champion"]:
            if not any(entry.get("move") == line["move"] for entry in read_journal(registry.workspace)):
                _journal(registry, {**line, "repaired": True})
                said.append(f"repaired: the move to version {number} at {line['since']} was missing in the journal")
        else:
            registry.set_alias(name, PREVIOUS, intent["previous_before"])
            said.append(
                f"undone: a move to version {line['champion']} ended half-way; the champion is {number or 'unset'}"
            )
        stage.remove(path)
    trial = read_trial(registry, name)
    if trial is not None and not trial_lives(registry, name):
        end_trial(registry, name)
        said.append(f"ended: the trial of version {trial.version}, whose process is gone")
    if champion is not None and is_tried(registry, champion):
        registry.set_alias(name, CHALLENGER, None)
        said.append(f"repaired: version {number} is the champion, and the challenger no more")
    if number != _journaled(registry, name):
        reason = "the alias was moved outside of this workspace, or the journal lost its line"
        previous = registry.by_alias(name, PREVIOUS)
        numbers = {"champion": number, "previous": previous.number if previous else None}
        append_journal(registry.workspace, FOUND, name=name, **numbers, since=now(), reasons=[reason])
        said.append(f"journaled: the champion is {number or 'unset'}, which no line told; {reason}")
    return said


def _unsettled(registry: Registry, name: str) -> bool:
    """Look, without a lock and without writing, whether there is something to repair."""
    if stage.fetch(_intent_path(registry, name)):
        return True
    champion = registry.by_alias(name, CHAMPION)
    if champion is not None and is_tried(registry, champion):
        return True
    if read_trial(registry, name) is not None and not trial_lives(registry, name):
        return True
    return (champion.number if champion else None) != _journaled(registry, name)


def _check_challenger(registry: Registry, name: str, number: int) -> None:
    champion = registry.by_alias(name, CHAMPION)
    if champion is not None and champion.number == registry.by_number(name, number).number:
        raise RegistryError(
            f"challenger of {name} expected to be another version than the champion, found {number}, which serves"
            " already; name another version"
        )


def _journaled(registry: Registry, name: str) -> int | None:
    """The champion by the journal's last move."""
    moves = [line for line in read_journal(registry.workspace) if is_move(line, name)]
    return moves[-1]["champion"] if moves else None


def _journal(registry: Registry, line: Mapping[str, Any]) -> None:
    append_journal(registry.workspace, **line)


def _intent_path(registry: Registry, name: str) -> Path:
    return registry.workspace.root / "locks" / f"aliases-{name}.intent.json"
