"""Who may ask, how often, and how urgently: API keys from a file that holds only their hashes.

A key is 256 random bits, so a plain SHA-256 is enough: there is nothing to guess from. Every key has a bucket of tokens
(capacity: a minute's requests; refilled evenly), kept by each replica for itself. The file is read again when it
changes, so a key is withdrawn without a restart. Keys are never logged and never part of an error.
"""

import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.api_errors import ApiError, later
from cluster.artifacts import write_bytes_atomic
from cluster.errors import PlacementError
from cluster.images_schema import MOST_PRIORITY, USUAL_PRIORITY
from cluster.lease import hold_lease
from cluster.placement import ServeSection

PREFIX = "fresco-"
"""Lets secret scanners recognise a key that was published by accident."""
KEY_BYTES = 32
LONGEST_KEY_CHARS = 200
USUAL_REQUESTS_PER_MINUTE = 60.0
LOOK_EVERY_S = 1.0
LOCK_LIMIT_S = 10.0
LOG = logging.getLogger(__name__)


class ApiKey(BaseModel):
    """One entry of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]
    """Who holds the key; safe to log."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    requests_per_minute: float = Field(USUAL_REQUESTS_PER_MINUTE, gt=0, allow_inf_nan=False)
    priority: int = Field(USUAL_PRIORITY, ge=0, le=MOST_PRIORITY)
    """Of its requests, unless they ask for a lower one."""


@dataclass
class Bucket:
    """Tokens of one key: `per_minute` at most, refilled evenly."""

    per_minute: float
    filled_at: float
    tokens: float = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = self.capacity

    @property
    def capacity(self) -> float:
        # A key of less than one request a minute still holds one.
        return max(1.0, self.per_minute)

    def take(self, now: float) -> float:
        """Take one token and return 0, or return the seconds until there is one."""
        per_s = self.per_minute / 60
        self.tokens = min(self.capacity, self.tokens + max(0.0, now - self.filled_at) * per_s)
        self.filled_at = now
        if self.tokens >= 1:
            self.tokens -= 1
            return 0.0
        return (1 - self.tokens) / per_s


class KeyRing:
    """The keys of a file, found by what a client presents; safe to use from several threads."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self._clock = path, clock
        self._lock = threading.Lock()
        self._buckets: dict[str, Bucket] = {}
        self._stamp = _stamp_of(path)
        self._keys = read_keys(path)
        self._looked_at = clock()

    def admit(self, authorization: str | None, counted: bool = True) -> ApiKey:
        """Return the key of an `Authorization: Bearer KEY` header and take one of its tokens when `counted`.

        ApiError 401 without a known key, 429 with Retry-After when its minute is used up.
        """
        with self._lock:
            self._look_again()
            key = _find(self._keys, authorization)
            if not counted:
                return key
            bucket = self._buckets.get(key.sha256)
            if bucket is None or bucket.per_minute != key.requests_per_minute:
                bucket = self._buckets[key.sha256] = Bucket(key.requests_per_minute, self._clock())
            wait_s = bucket.take(self._clock())
        if wait_s > 0:
            seconds = int(wait_s) + 1
            message = f"key {key.name!r} expected at most {key.requests_per_minute:g} requests a minute, found more"
            raise later(429, f"{message}; try again in {seconds} s", "rate_limit_exceeded", seconds)
        return key

    def _look_again(self) -> None:
        """Read a changed file; a wrong one leaves the keys as they were, so that a typo locks nobody out."""
        now = self._clock()
        if now - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = now
        stamp = _stamp_of(self.path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = read_keys(self.path)
        except PlacementError as error:
            LOG.error("the keys stay as they were: %s", error)


def open_keys(limits: ServeSection) -> KeyRing | None:
    """Return the key ring of `serve.api_keys_file`, None when no keys are asked for."""
    return KeyRing(Path(limits.api_keys_file)) if limits.api_keys_file else None


def check_exposure(limits: ServeSection) -> None:
    """PlacementError when other machines could draw without a key, or the keys' file cannot be used."""
    if limits.api_keys_file:
        if not read_keys(Path(limits.api_keys_file)):
            raise PlacementError(
                f"serve.api_keys_file expected at least one key, found none in {limits.api_keys_file}; make one with:"
                f" fresco serve --new-key NAME --set serve.api_keys_file={limits.api_keys_file}"
            )
    elif not is_loopback(limits.host):
        raise PlacementError(
            f"serve.api_keys_file expected when serve.host is reached from other machines, found host {limits.host!r}"
            " without keys: anybody could draw; make a key with: fresco serve --new-key NAME --set"
            " serve.api_keys_file=FILE, then serve with the same --set, or serve on 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`; a name other than localhost may mean anything."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def new_key(
    path: Path,
    name: str,
    requests_per_minute: float = USUAL_REQUESTS_PER_MINUTE,
    priority: int = USUAL_PRIORITY,
) -> str:
    """Make a key, add its hash to the file, and return the key: the only time that anybody sees it.

    PlacementError when the name is taken or the file is wrong; then it is left as it was.
    """
    secret = PREFIX + secrets.token_urlsafe(KEY_BYTES)
    entry = {"name": name, "sha256": _hash(secret), "requests_per_minute": requests_per_minute, "priority": priority}
    with hold_lease(path.with_name(f"{path.name}.lock"), "fresco serve --new-key", wait_s=LOCK_LIMIT_S):
        keys = read_keys(path) if path.exists() else ()
        try:
            keys = (*keys, ApiKey(**entry))
        except ValidationError as error:
            raise PlacementError(f"--new-key expected letters, digits, . _ - for a name, found {name!r}") from error
        _refuse_twins(keys, path)
        write_bytes_atomic(path, yaml.safe_dump([key.model_dump() for key in keys], sort_keys=False).encode())
    return secret


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """Read the file: a YAML list of entries. PlacementError names the entry and the field, never a value."""
    try:
        entries = yaml.safe_load(path.read_text()) or []
    except FileNotFoundError:
        raise PlacementError(
            f"serve.api_keys_file expected at {path}, found nothing; make a key with: fresco serve --new-key NAME"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise PlacementError(f"serve.api_keys_file expected to be readable, found {path}: {error}") from None
    except yaml.YAMLError:
        raise PlacementError(f"serve.api_keys_file expected YAML in {path}, found something else") from None
    if not isinstance(entries, list):
        raise PlacementError(f"serve.api_keys_file expected a list of keys in {path}, found a {type(entries).__name__}")
    keys = tuple(_read_entry(entry, number, path) for number, entry in enumerate(entries, 1))
    _refuse_twins(keys, path)
    return keys


def _read_entry(entry: Any, number: int, path: Path) -> ApiKey:
    try:
        return ApiKey.model_validate(entry)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "entry"
        message = f"serve.api_keys_file expected name, sha256, requests_per_minute and priority in entry {number} of"
        raise PlacementError(f"{message} {path}, found {where} wrong: {problem['msg']}") from None


def _refuse_twins(keys: tuple[ApiKey, ...], path: Path) -> None:
    names = [key.name for key in keys]
    if twins := {name for name in names if names.count(name) > 1}:
        raise PlacementError(f"serve.api_keys_file expected each name once in {path}, found {min(twins)!r} again")


def _find(keys: tuple[ApiKey, ...], authorization: str | None) -> ApiKey:
    """Compare with every key in constant time each, so that timing tells neither a prefix nor a position."""
    match = re.fullmatch(rf"(?i:bearer) +(\S{{1,{LONGEST_KEY_CHARS}}})", authorization or "")
    presented = _hash(match.group(1)) if match else ""
    found = [key for key in keys if hmac.compare_digest(key.sha256, presented)]
    if not found:
        what = "a key that is not known" if match else "none"
        error = ApiError(
            f"Authorization expected to be Bearer and a key of this endpoint, found {what}; ask its owner for one",
            code="invalid_api_key",
            status=401,
        )
        error.headers = {"WWW-Authenticate": "Bearer"}
        raise error
    return found[0]


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _stamp_of(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
