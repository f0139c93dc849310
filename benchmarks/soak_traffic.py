"""Clients of the soak test: patient ones that try again as they are told, and rude ones that hang up or cancel.

A patient client does what OpenAI's does: an error that says it may be repeated is repeated after `Retry-After` seconds.
Pictures are asked for in every form: in the answer, as a stream, by address, and as edits. Everything that happened to
a request is kept as its attempts, to be judged afterwards in `soak_checks`.
"""

import asyncio
import base64
import io
import json
import random
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
from PIL import Image

from benchmarks.serve_requests import make_client
from components.load_plan import Arrival

Form = Literal["plain", "stream", "url", "edit"]
FORMS: tuple[tuple[Form, float], ...] = (("plain", 0.7), ("stream", 0.2), ("url", 0.05), ("edit", 0.05))
GENERATIONS, EDITS, REQUESTS = "/v1/images/generations", "/v1/images/edits", "/v1/requests"
Kind = Literal["drawn", "left", "clear", "unclear", "final"]
"""left: we hung up, or cancelled. clear: an error in OpenAI's shape that may be repeated. unclear: one that may be
repeated, but is not in that shape, or a broken connection. final: an error that says it will never work."""
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
    form: Form = "plain"
    attempts: list[Attempt] = field(default_factory=list)
    version: int | None = None
    seeds: tuple[int, ...] = ()
    pictures: tuple[bytes, ...] = ()
    request_id: str = ""

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
    url: str, arrivals: Sequence[Arrival], rude_share: float, seed: int, stories: list[Story]
) -> None:
    """Send every request when it is due and see it through; `stories` grows as requests begin."""
    chance = random.Random(seed)
    start = time.monotonic()
    forms, shares = zip(*FORMS, strict=True)
    async with make_client() as client:

        async def live_through(arrival: Arrival, form: Form, patience_s: float | None, cancels: bool) -> None:
            due = start + arrival.due_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            story = Story(arrival.body, patience_s is not None, due, form)
            stories.append(story)
            if patience_s is None:
                await _insist(client, url, story)
            elif cancels:
                await _cancel(client, url, story, patience_s)
            else:
                await _hang_up(client, url, story, patience_s)

        rude = [chance.uniform(*HANG_UP_S) if chance.random() < rude_share else None for _ in arrivals]
        ways = chance.choices(forms, shares, k=len(arrivals))
        cancels = [chance.random() < 0.5 for _ in arrivals]
        await asyncio.gather(*map(live_through, arrivals, ways, rude, cancels))


async def _insist(client: httpx.AsyncClient, url: str, story: Story) -> None:
    while time.monotonic() - story.due < PATIENCE_S:
        attempt = await _try(client, url, story)
        story.attempts.append(attempt)
        if attempt.kind in ("drawn", "final"):
            return
        pause_s = 0.5 * 2 ** min(4, len(story.attempts)) if attempt.pause_s is None else attempt.pause_s
        await asyncio.sleep(min(LONGEST_PAUSE_S, pause_s))


async def _hang_up(client: httpx.AsyncClient, url: str, story: Story, patience_s: float) -> None:
    began = time.monotonic()
    try:
        async with asyncio.timeout(patience_s):
            story.attempts.append(await _try(client, url, story))
    except TimeoutError:
        story.attempts.append(Attempt(began, time.monotonic(), "left"))


async def _cancel(client: httpx.AsyncClient, url: str, story: Story, patience_s: float) -> None:
    """Cancel by name. Who is told that it was cancelled gets no picture, who is told that it was not gets one."""
    story.request_id = f"soak_{secrets.token_hex(8)}"
    drawing = asyncio.create_task(_try(client, url, story))
    await asyncio.sleep(patience_s)
    try:
        told = await client.delete(f"{url}{REQUESTS}/{story.request_id}")
    except httpx.HTTPError:  # its replica was killed: the answer says so
        told = None
    attempt = await drawing
    if told is not None and told.status_code == 200:
        as_told = "request_cancelled" in attempt.detail
        kind: Kind = "left" if as_told else "unclear"
        attempt = Attempt(attempt.began, attempt.ended, kind, "" if as_told else f"cancelled, but {attempt.kind}")
    story.attempts.append(attempt)


async def _try(client: httpx.AsyncClient, url: str, story: Story) -> Attempt:
    began = time.monotonic()
    headers = {"x-request-id": story.request_id} if story.request_id else {}
    try:
        async with asyncio.timeout(ATTEMPT_LIMIT_S):
            request = client.build_request("POST", url + _route(story.form), headers=headers, **_content(story))
            answer = await client.send(request)
            error = None if answer.status_code == 200 else read_error(answer)
            if error is None:
                error = await _keep(client, story, answer)
    except (httpx.HTTPError, TimeoutError) as broken:
        return Attempt(began, time.monotonic(), "unclear", type(broken).__name__)
    if error is None:
        return Attempt(began, time.monotonic(), "drawn")
    after = answer.headers.get("retry-after", "")
    return Attempt(began, time.monotonic(), *error, float(after) if after.isdigit() else None)


def _route(form: Form) -> str:
    return EDITS if form == "edit" else GENERATIONS


def _content(story: Story) -> dict[str, Any]:
    """The request's body: JSON, or the form of an edit."""
    if story.form == "edit":
        fields = {key: str(value) for key, value in story.body.items()}
        return {"data": {**fields, "strength": "0.5"}, "files": {"image": ("start.png", _start_picture(), "image/png")}}
    more = {"stream": {"stream": True, "partial_images": 1}, "url": {"response_format": "url"}}
    return {"json": story.body | more.get(story.form, {})}


def _start_picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "steelblue").save(file, "PNG")
    return file.getvalue()


async def _keep(client: httpx.AsyncClient, story: Story, answer: httpx.Response) -> tuple[Kind, str] | None:
    """Put what was drawn into the story; the error of a stream or an address that has none."""
    story.request_id = answer.headers.get("x-request-id", "")
    if story.form == "stream":
        events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n") if line[:6] == "data: "]
        failed = [event["error"] for event in events if "error" in event]
        if failed:
            return ("clear" if failed[0].get("code") else "unclear"), f"stream: {failed[0].get('code')}"
        done = [event for event in events if event["type"].endswith("completed")]
        if not done:
            return "unclear", "stream: without an end"
        content = {**done[0], "seeds": [event["seed"] for event in done], "data": done}
    else:
        content = answer.json()
    story.version, story.seeds = content.get("model_version"), tuple(content.get("seeds", ()))
    if story.form == "url":
        got = [await client.get(picture["url"]) for picture in content["data"]]
        bad = [f"url: {one.status_code}" for one in got if one.status_code != 200]
        if bad:
            return "unclear", bad[0]
        story.pictures = tuple(one.content for one in got)
    else:
        story.pictures = tuple(base64.b64decode(picture["b64_json"]) for picture in content["data"])
    return None


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
