"""How is a holder that lost its lease, and does not know it yet, kept from changing what is its heir's now?

By files that remember the newest token that touched them: JSON of the form {"token": 7, "value": ...}, on a disk or on
S3. A change with an older token is refused at the storage itself (compare and swap: flock and a digest on a disk, an
If-Match condition on S3), so it does not matter how long a process slept between its last look and its write. Reading
with a token seals the file first: what an heir has read, nobody before it can change any more.
"""

import json
from typing import Any

from cluster import storage
from cluster.errors import DamagedError, LeaseLostError, StorageError
from cluster.stage_names import shared

MAX_TRIES = 20


def read_fenced(uri: str, token: int) -> Any | None:
    """Return the file's value (None when there is none) and keep holders of older tokens from writing it from now on.

    LeaseLostError when a newer token has touched it, DamagedError when it is no such file.
    """
    uri = shared(uri)
    for _ in range(MAX_TRIES):
        value, newest, tag = _load(uri)
        _refuse_late(uri, newest, token)
        if newest == token or storage.replace_if(uri, _content(value, token), tag):
            return value
    raise _busy(uri)


def write_fenced(uri: str, value: Any, token: int) -> None:
    """Replace the file's value (anything JSON can hold); LeaseLostError, and nothing written, for an older token."""
    uri = shared(uri)
    for _ in range(MAX_TRIES):
        _, newest, tag = _load(uri)
        _refuse_late(uri, newest, token)
        if storage.replace_if(uri, _content(value, token), tag):
            return
    raise _busy(uri)


def peek_fenced(uri: str) -> Any | None:
    """Return the file's value without sealing it, for those who only look; None when there is none."""
    return _load(shared(uri))[0]


def _load(uri: str) -> tuple[Any | None, int, str | None]:
    """Return (value, newest token, tag for the swap)."""
    try:
        content, tag = storage.read_tagged(uri)
    except FileNotFoundError:
        return None, 0, None
    try:
        record = json.loads(content)
        return record["value"], int(record["token"]), tag
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedError(
            f'{uri} expected to be {{"token": N, "value": ...}}, found {content[:80]!r}; restore or remove it'
        ) from error


def _refuse_late(uri: str, newest: int, token: int) -> None:
    if newest > token:
        raise LeaseLostError(
            f"{uri} expected to be changed under token {newest} or a newer one, found token {token}: another process"
            " took the lease over; nothing was changed, run the command again"
        )


def _content(value: Any, token: int) -> bytes:
    return (json.dumps({"token": token, "value": value}, ensure_ascii=False, sort_keys=True) + "\n").encode()


def _busy(uri: str) -> StorageError:
    return StorageError(f"{uri} expected to change hands at most {MAX_TRIES} times meanwhile; run the command again")
