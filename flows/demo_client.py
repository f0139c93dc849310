"""A client that keeps asking while the model behind the endpoint changes, and counts what it was answered."""

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import EndpointError
from flows.generate import Wish, post

PAUSE_S = 0.5
"""Between an answer and the next request: a client that waits for its picture, not a flood."""


@dataclass
class Client:
    """Asks for one picture after the other from `with` to its end."""

    url: str
    prompts: Sequence[str]
    requests: int = 0
    versions: Counter[int] = field(default_factory=Counter)
    """Pictures by the version that drew them."""
    failures: list[str] = field(default_factory=list)
    longest_s: float = 0.0

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask_on, name="demo client", daemon=True)

    def __enter__(self) -> "Client":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def numbers(self) -> dict[str, Any]:
        """What is told of it."""
        told = {"requests": self.requests, "failed": len(self.failures), "longest_s": round(self.longest_s, 2)}
        return {**told, "by_version": {str(version): count for version, count in sorted(self.versions.items())}}

    def _ask_on(self) -> None:
        while not self._over.is_set():
            prompt = self.prompts[self.requests % len(self.prompts)]
            began = time.monotonic()
            try:
                answer = post(f"{self.url}/v1/images/generations", Wish(seed=self.requests).body(prompt))
                self.versions[int(answer["model_version"] or 0)] += 1
            except EndpointError as error:
                self.failures.append(str(error))
            self.requests += 1
            self.longest_s = max(self.longest_s, time.monotonic() - began)
            self._over.wait(PAUSE_S)
