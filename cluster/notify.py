"""Who is told what the loop decided: a webhook, which gets a signed message, and a command, which gets it on stdin.

Telling never stops the work: whatever goes wrong comes back as sentences, within a bounded time. A message is one JSON
object made of a line of the journal: what happened, in which workspace, the decision with its reasons, the versions and
where to read on. It holds no secrets; addresses and keys are in no sentence either.
"""

import json
import math
import uuid
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, Protocol

from cluster import s3
from cluster.errors import PlacementError
from cluster.hook_command import check_command, run_command
from cluster.redaction import redacted
from cluster.webhook import check_address, post, read_key, shown

VERSIONS = ("version", "champion", "previous", "champion_before", "champion_after")
MADE_OF = ("name", "cycle", "id", "stage", "state", "run_id", "dataset")
DECISIONS = ("decision", "verdict")
LINKS = ("report", "evaluation")


class Receivers(Protocol):
    """What is needed of the config's section `retrain`."""

    @property
    def webhook(self) -> str: ...

    @property
    def webhook_secret_file(self) -> str: ...

    @property
    def command(self) -> str: ...


def check_form(section: Receivers) -> None:
    """Refuse what can never be right, by looking at the settings alone; PlacementError says why."""
    if section.webhook:
        check_address(section.webhook)
        if not section.webhook_secret_file:
            raise PlacementError(
                "webhook_secret_file expected beside webhook, found none; every message is signed: make a key with"
                " (umask 077; openssl rand -hex 32 > FILE)"
            )
    if section.command:
        check_command(section.command, look=False)


def check(section: Receivers) -> None:
    """Refuse receivers that could not be told now: no key, no program; for a loop that is about to start."""
    check_form(section)
    if section.webhook:
        read_key(section.webhook_secret_file)
    if section.command:
        check_command(section.command)


def named(webhook: str, command: str) -> dict[str, str]:
    """Name the receivers for whoever may read a record: scheme and host, and the program; the rest may be a secret."""
    program = PurePosixPath(check_command(command, look=False)[0]).name if command else ""
    return {"webhook": shown(webhook) if webhook else "", "command": program}


def message_of(line: Mapping[str, Any], workspace: str) -> dict[str, Any]:
    """Make the message about a line of the journal; of the workspace it names the last part of its address."""
    decision = next((str(line[key]) for key in DECISIONS if line.get(key) is not None), None)
    reasons = line.get("reasons")
    return {
        "time": line.get("time"),
        "event": line.get("event"),
        "workspace": PurePosixPath(workspace).name,
        "decision": decision,
        "reasons": [str(reason) for reason in reasons] if isinstance(reasons, list) else [],
        "versions": {key: line[key] for key in VERSIONS if line.get(key) is not None},
        **{key: line[key] for key in MADE_OF if line.get(key) is not None},
        "links": {key: line[key] for key in LINKS if line.get(key)},
    }


def send(section: Receivers, event: Mapping[str, Any]) -> list[str]:
    """Tell webhook and command, where they are set, of an event; return what went wrong, one sentence each."""
    if not section.webhook and not section.command:
        return []
    message_id = f"fresco_{uuid.uuid4().hex}"
    body = json.dumps({**_plain(event), "id": message_id}, ensure_ascii=False, default=str).encode()
    found = []
    if section.webhook:
        try:
            check_address(section.webhook)
            key = read_key(section.webhook_secret_file)
            found.append(post(section.webhook, key, message_id, body))
        except PlacementError as error:
            found.append(str(error))
    if section.command:
        found.append(run_command(section.command, body))
    return [problem for problem in found if problem]


def _plain(value: Any) -> Any:
    """Return a value that any JSON reader takes: no NaN, no secrets in texts."""
    if isinstance(value, str):
        return redacted(value, s3.secrets())
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
