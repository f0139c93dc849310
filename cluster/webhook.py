"""How is a message posted so that its receiver can tell who sent it, and nobody else learns of it?

To https addresses, or http on this machine, signed as Standard Webhooks 1.0 says: HMAC-SHA256 over "ID.TIMESTAMP.BODY",
base64, under `webhook-signature` as "v1,SIGNATURE". A receiver refuses old timestamps and keeps ids, so a message that
was overheard is worth nothing. Redirects are never followed: another host would get what was meant for this one. An
address may itself be a secret (chat services put their token in its path), so messages name scheme and host only.
"""

import base64
import binascii
import hashlib
import hmac
import os
import queue
import stat
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

from cluster import s3
from cluster.errors import PlacementError
from cluster.redaction import redacted

ID, TIMESTAMP, SIGNATURE = "webhook-id", "webhook-timestamp", "webhook-signature"
THIS_MACHINE = ("127.0.0.1", "localhost", "::1")
KEY_PREFIX = "whsec_"
MIN_KEY_BYTES = 16
LIMIT_S = 5.0
"""For one attempt as a whole: name, connection, sending, the answer's first line and headers."""
WAITS_S = (0.5, 2.0)
"""Before the second and the third attempt."""
AGAIN = (408, 425, 429)
"""Statuses, besides 500 and above, after which the same message may be taken the next time."""
MOST_CHARS = 200


def check_address(address: str) -> None:
    """Refuse, with PlacementError, where a message could be read on the way or where its address holds a password."""
    try:
        parts = urlsplit(address)
        host, scheme, _ = parts.hostname or "", parts.scheme.lower(), parts.port
    except ValueError:
        host, scheme, parts = "", "", urlsplit("")
    plain = all(character.isprintable() and not character.isspace() for character in address)
    if not plain or not host or scheme not in ("https", "http"):
        raise PlacementError("webhook expected an address such as https://HOST/PATH, found none")
    if "@" in parts.netloc:
        raise PlacementError("webhook expected an address without user or password, found one; messages are signed")
    if scheme == "http" and host not in THIS_MACHINE:
        raise PlacementError(
            f"webhook expected https (http only on {', '.join(THIS_MACHINE)}), found http://{host}; messages to other"
            " machines must not be readable on the way"
        )


def read_key(path: str) -> bytes:
    """Return the key of the signatures: the file's text, or the bytes it means where it begins with whsec_ (base64).

    PlacementError when it is missing, too short, or readable by others than its owner (a group may read a file of
    another owner: that is how Kubernetes hands out secrets).
    """
    name = Path(path).expanduser()
    try:
        with name.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise PlacementError(f"webhook_secret_file expected a file, found something else at {name}")
            mode = stat.S_IMODE(status.st_mode)
            if mode & 0o007 or (mode & 0o070 and status.st_uid == os.geteuid()):
                raise PlacementError(
                    f"{name} expected to be readable by its owner only, found mode {mode:o}; run: chmod 600 {name}"
                    " (as a Kubernetes secret: defaultMode: 0400)"
                )
            text = file.read(4096).strip()
    except OSError as error:
        raise PlacementError(
            f"webhook_secret_file expected the key of the signatures at {name}, found: {error.strerror}; make one with:"
            f" (umask 077; openssl rand -hex 32 > {name})"
        ) from error
    try:
        prefix = KEY_PREFIX.encode()
        key = base64.b64decode(text.removeprefix(prefix), validate=True) if text.startswith(prefix) else text
    except binascii.Error:
        raise PlacementError(f"{name} expected base64 after {KEY_PREFIX}, found something else") from None
    if len(key) < MIN_KEY_BYTES:
        raise PlacementError(
            f"{name} expected a key of at least {MIN_KEY_BYTES} bytes, found {len(key)}; make one with:"
            " openssl rand -hex 32"
        )
    return key


def sign(key: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """Return the value of the signature's header."""
    signed = hmac.new(key, f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return "v1," + base64.b64encode(signed).decode("ascii")


def post(
    address: str,
    key: bytes,
    message_id: str,
    body: bytes,
    limit_s: float = LIMIT_S,
    waits_s: tuple[float, ...] = WAITS_S,
) -> str:
    """Post a JSON body, again after `waits_s` where that may help; return "" when it was taken, else what was found.

    Every attempt is signed anew and has the same id, so that a receiver that took it already can tell.
    """
    found, attempts = "", 0
    for wait_s in (0.0, *waits_s):
        time.sleep(wait_s)
        attempts += 1
        timestamp = int(time.time())
        headers = {
            "content-type": "application/json",
            "user-agent": "fresco",
            ID: message_id,
            TIMESTAMP: str(timestamp),
            SIGNATURE: sign(key, message_id, timestamp, body),
        }
        found, again = _within(limit_s, address, headers, body)
        if not found or not again:
            break
    if not found:
        return ""
    times = f" ({attempts} attempts)" if attempts > 1 else ""
    return f"webhook {shown(address)} expected to take the message, found: {found}{times}"


def _within(limit_s: float, address: str, headers: dict[str, str], body: bytes) -> tuple[str, bool]:
    """Make one attempt in a thread: a name server, or an answer that trickles in, would outlast any single timeout."""
    answers: queue.SimpleQueue[tuple[str, bool]] = queue.SimpleQueue()
    work = threading.Thread(
        target=lambda: answers.put(_attempt(limit_s, address, headers, body)), name="webhook", daemon=True
    )
    work.start()
    work.join(limit_s)
    try:
        return answers.get_nowait()
    except queue.Empty:
        return f"no answer within {limit_s:g} s", True


def _attempt(limit_s: float, address: str, headers: dict[str, str], body: bytes) -> tuple[str, bool]:
    """Return what went wrong ("" when nothing did), and whether another attempt may help."""
    import httpx

    # Proxies of the environment are for other machines only. The answer's body is never read: only its status counts.
    elsewhere = urlsplit(address).scheme.lower() == "https"
    try:
        with (
            httpx.Client(timeout=limit_s, follow_redirects=False, trust_env=elsewhere) as client,
            client.stream("POST", address, headers=headers, content=body) as answer,
        ):
            status, location = answer.status_code, answer.headers.get("location", "")
    except httpx.TimeoutException:
        return f"no answer within {limit_s:g} s", True
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        return _told(error, address), True
    if 200 <= status < 300:
        return "", False
    if 300 <= status < 400:
        return (
            f"status {status}, a redirect to {shown(location)}; redirects are not followed: name that address",
            False,
        )
    return f"status {status}", status >= 500 or status in AGAIN


def _told(error: Exception, address: str) -> str:
    """What a library says of a failed call, in one line and without the address."""
    text = (str(error) or type(error).__name__).splitlines()[0]
    return redacted(text.replace(address, shown(address)), s3.secrets())[:MOST_CHARS]


def shown(address: str) -> str:
    """Scheme and host of an address; whatever else is in it may be a secret."""
    try:
        parts = urlsplit(address)
        port = f":{parts.port}" if parts.port else ""
        host = f"[{parts.hostname}]" if parts.hostname and ":" in parts.hostname else parts.hostname
        found = f"{parts.scheme}://{host}{port}" if host else "the same host"
    except ValueError:
        return "an address that cannot be read"
    return "".join(character for character in found if character.isprintable())[:MOST_CHARS]
