"""Clients of the soak test: patient ones that try again as they are told, and rude ones that hang up.

A patient client does what OpenAI's does: an error that says it may be repeated is repeated after `Retry-After` seconds.
Everything that happened to a request is kept as its attempts, to be judged afterwards in `soak_checks`.
"""

import asyncio
import base64
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from benchmarks.serve_requests import make_client
from components.load_plan import Arrival

Kind = Literal["drawn", "left", "clear", "unclear", "final"]
"""left: we hung up. clear: an error in OpenAI's shape that may be repeated. unclear: one that may be repeated, but is
not in that shape, or a broken connection. final: an error that says it will never work."""
PATIENCE_S = 120.0
ATTEMPT_LIMIT_S = 60.0
LONGEST_PAUSE_S = 5.0
HANG_UP_S = (0.02, 0.5)
MAY_BE_REPEATED = (408, 409, 429)


@dataclass(frozen=True)
class Attempt:
    """One try; times are seconds of `time.monotonic`."""

    began: float
    ended: float
    kind: Kind
    detail: str = ""
    pause_s: float | None = None
    """What Retry-After asked for."""


@dataclass
class Story:
    """One request from the moment it was due."""

    body: dict[str, Any]
    rude: bool
    due: float
    attempts: list[Attempt] = field(default_factory=list)
    version: int | None = None
    seeds: tuple[int, ...] = ()
    pictures: tuple[bytes, ...] = ()

    @property
    def drawn(self) -> bool:
        return bool(self.attempts) and self.attempts[-1].kind == "drawn"

    @property
    def left(self) -> bool:
        return bool(self.attempts) and self.attempts[-1].kind == "left"

    @property
    def waited_s(self) -> float:
        """From due to the end of the last attempt."""
        return self.attempts[-1].ended - self.due


async def send_traffic(
    address: str, arrivals: Sequence[Arrival], rude_share: float, seed: int, stories: list[Story]
) -> None:
    """Send every request when it is due and see it through; `stories` grows as requests begin."""
    chance = random.Random(seed)
    start = time.monotonic()
    async with make_client() as client:

        async def live_through(arrival: Arrival, patience_s: float | None) -> None:
            due = start + arrival.due_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            story = Story(arrival.body, patience_s is not None, due)
            stories.append(story)
            if patience_s is None:
                await _insist(client, address, story)
            else:
                await _hang_up(client, address, story, patience_s)

        rude = [chance.uniform(*HANG_UP_S) if chance.random() < rude_share else None for _ in arrivals]
        await asyncio.gather(*(live_through(*pair) for pair in zip(arrivals, rude, strict=True)))


async def _insist(client: httpx.AsyncClient, address: str, story: Story) -> None:
    while time.monotonic() - story.due < PATIENCE_S:
        attempt = await _try(client, address, story)
        story.attempts.append(attempt)
        if attempt.kind in ("drawn", "final"):
            return
        pause_s = 0.5 * 2 ** min(4, len(story.attempts)) if attempt.pause_s is None else attempt.pause_s
        await asyncio.sleep(min(LONGEST_PAUSE_S, pause_s))


async def _hang_up(client: httpx.AsyncClient, address: str, story: Story, patience_s: float) -> None:
    began = time.monotonic()
    try:
        async with asyncio.timeout(patience_s):
            story.attempts.append(await _try(client, address, story))
    except TimeoutError:
        story.attempts.append(Attempt(began, time.monotonic(), "left"))


async def _try(client: httpx.AsyncClient, address: str, story: Story) -> Attempt:
    began = time.monotonic()
    try:
        answer = await client.post(address, json=story.body, timeout=ATTEMPT_LIMIT_S)
    except httpx.HTTPError as broken:
        return Attempt(began, time.monotonic(), "unclear", type(broken).__name__)
    ended = time.monotonic()
    if answer.status_code == 200:
        content = answer.json()
        story.version, story.seeds = content.get("model_version"), tuple(content.get("seeds", ()))
        story.pictures = tuple(base64.b64decode(picture["b64_json"]) for picture in content["data"])
        return Attempt(began, ended, "drawn")
    kind, detail = read_error(answer)
    after = answer.headers.get("retry-after", "")
    return Attempt(began, ended, kind, detail, float(after) if after.isdigit() else None)


def read_error(answer: httpx.Response) -> tuple[Kind, str]:
    """Tell how clear an error is, and what it says in a few words."""
    status = answer.status_code
    asked_not_to = answer.headers.get("x-should-retry") == "false"  # OpenAI's client obeys it too
    again = (status >= 500 or status in MAY_BE_REPEATED) and not asked_not_to
    try:
        error = answer.json()["error"]
        in_shape = isinstance(error["message"], str) and "type" in error and "code" in error
    except (ValueError, KeyError, TypeError):
        in_shape = False
    if in_shape:
        return ("clear" if again else "final"), f"{status} {error['code']}"
    # What an error page quotes differs from time to time; its first words do not.
    return ("unclear" if again else "final"), f"{status} not in OpenAI's shape: {answer.text[:40]!r}"
