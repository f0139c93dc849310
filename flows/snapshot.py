"""What arrived, frozen: a look at the source as one file. A cycle works on the same arrivals whenever it goes on.

So what is frozen once stays: the file is created or left alone. A loop that was killed before it noted the stage finds
what it froze, and one that lost its lease and does not know it yet cannot replace what its heir froze.
"""

import json
from dataclasses import asdict
from typing import Any

from cluster import storage
from cluster.artifacts import Workspace
from cluster.errors import StorageError
from components.arrivals import Arrival, Arrivals, Pending
from components.listings import Seen
from components.sources import Candidate


def freeze(workspace: Workspace, cycle: str, arrivals: Arrivals) -> Arrivals:
    """Write the arrivals of a cycle unless it has some; return those that it has now."""
    content = json.dumps(asdict(arrivals), ensure_ascii=False).encode()
    return arrivals if storage.put_if_absent(address(workspace, cycle), content) else thaw(workspace, cycle)


def thaw(workspace: Workspace, cycle: str) -> Arrivals:
    """Read them again; StorageError when they are gone or damaged."""
    uri = address(workspace, cycle)
    try:
        value = json.loads(storage.read_bytes(uri))
        return Arrivals(
            new=tuple(_arrival(one) for one in value["new"]),
            pending=tuple(Pending(**one) for one in value["pending"]),
            repeated=tuple(_arrival(one) for one in value["repeated"]),
            missing=tuple(value["missing"]),
            counts=value["counts"],
            cursor=value["cursor"],
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{uri} expected to hold the arrivals of cycle {cycle}, found: {error}; bring it back, or remove"
            " retrain/state.json to begin anew"
        ) from error


def key_of(arrival: Arrival) -> str:
    """Name an arrival by its bytes, or where those are not known apart (a table), by its files."""
    group = arrival.candidate.row_group
    return arrival.sha256 or " ".join([f"{file.uri} {file.etag}" for file in arrival.files] + [str(group)])


def address(workspace: Workspace, cycle: str) -> str:
    return workspace.place("retrain", "cycles", f"{cycle}.json")


def _arrival(value: dict[str, Any]) -> Arrival:
    files = tuple(Seen(**file) for file in value["files"])
    return Arrival(Candidate(**value["candidate"]), files, value["sha256"], value["pictures"])
