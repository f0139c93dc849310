"""The sets of weights in memory, which of them new requests start on, and when one may go.

A version stays until the last request that holds it has ended. The engine's lock, passed in, guards it; what is
told to `on_dropped` is told without it.
"""

import threading
from collections.abc import Callable, Iterator

from components.errors import InputError
from components.versions import Version


class LoadedVersions:
    """Versions by name."""

    def __init__(self, lock: threading.Condition, on_dropped: Callable[[str], None] | None) -> None:
        self.newest: Version | None = None
        """What requests that name no version start on."""
        self._lock, self._on_dropped = lock, on_dropped
        self._versions: dict[str, Version] = {}

    def __iter__(self) -> Iterator[Version]:
        return iter(self._versions.values())

    def __getitem__(self, name: str) -> Version:
        return self._versions[name]

    def add(self, version: Version) -> None:
        """Add a version that only requests use which name it."""
        with self._lock:
            if version.name in self._versions:
                name = version.name
                raise InputError(f"version expected a new name, found {name!r} loaded already; choose another")
            self._versions[version.name] = version

    def succeed(self, name: str) -> Version | None:
        """Make a version the newest; returns the one before it, which is retired, if there was another."""
        with self._lock:
            before, self.newest = self.newest, self._versions[name]
            if before is None or before is self.newest:
                return None
            before.retired = True
            return before

    def retire(self, name: str) -> None:
        with self._lock:
            version = self._versions[name]
            version.retired = True
            if version is self.newest:
                self.newest = None
        self.drop_if_idle(version)

    def hold(self, name: str | None) -> Version:
        """Return the version a request starts on, which stays loaded until it is released; InputError lists them."""
        with self._lock:
            version = self.newest if name is None else self._versions.get(name)
            if version is None or (name is not None and version.retired):
                loaded = ", ".join(v.name for v in self._versions.values() if not v.retired) or "none"
                raise InputError(f"version expected one of those that serve ({loaded}), found {name!r}; load it first")
            version.num_requests += 1
            return version

    def release(self, version: Version) -> None:
        with self._lock:
            version.num_requests -= 1
        self.drop_if_idle(version)

    def drop_if_idle(self, version: Version) -> None:
        with self._lock:
            idle = version.retired and version.num_requests == 0 and self._versions.get(version.name) is version
            if idle:
                del self._versions[version.name]
        if idle and self._on_dropped is not None:
            self._on_dropped(version.name)
