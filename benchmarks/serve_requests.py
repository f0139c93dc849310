"""The requests of the serving benchmark, how they are sent, and what is made of the outcomes; no server in sight.

Two mixes, both drawn from a seed: *drawn* has any steps from 8 to 40 and any guidance from 1 to 7, as issued by people
with sliders; *presets* has two values of each, which is the best case for grouping equal requests.
"""

import asyncio
import base64
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx
import numpy as np
from PIL import Image

from components.load_plan import Arrival, Mix, draw_arrivals
from components.sampler import PictureRequest

STEPS, GUIDANCE = (8, 40), (1.0, 7.0)
FOUR_SHARE = 0.06
PRESET_STEPS, PRESET_GUIDANCE = (15, 30), (3.0, 7.0)
SIZE = "64x64"
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Answer:
    """What came back for one request."""

    latency_s: float
    pictures: tuple[bytes, ...]
    """PNG files."""
    error: str = ""


def plan_requests(num_requests: int, rate_per_s: float, seed: int, presets: bool = False) -> list[Arrival]:
    """Draw exactly `num_requests` Poisson arrivals at a rate; guidance is a whole number.

    Whole numbers favour the peer that groups equal requests: of real-valued guidance no two would ever be equal.
    """
    duration_s = 1.0 + 2 * num_requests / rate_per_s
    arrivals: list[Arrival] = []
    while len(arrivals) < num_requests:
        duration_s *= 2
        mix = Mix(rate_per_s, duration_s, (SIZE,), STEPS, GUIDANCE, several_share=FOUR_SHARE, seed=seed)
        arrivals = draw_arrivals(mix)
    return [_rounded(arrival, presets) for arrival in arrivals[:num_requests]]


def _rounded(arrival: Arrival, presets: bool) -> Arrival:
    steps, guidance = arrival.body["steps"], arrival.body["guidance_scale"]
    if presets:
        steps = min(PRESET_STEPS, key=lambda preset: abs(preset - steps))
        guidance = min(PRESET_GUIDANCE, key=lambda preset: abs(preset - guidance))
    return replace(arrival, body={**arrival.body, "steps": steps, "guidance_scale": float(round(guidance))})


def rows_of(body: dict[str, Any]) -> list[PictureRequest]:
    """The same request as rows for the sampler."""
    width_px, height_px = (int(side) for side in body["size"].split("x"))
    first = PictureRequest(
        prompt=body["prompt"],
        negative_prompt=body.get("negative_prompt", ""),
        seed=body["seed"],
        steps=body["steps"],
        guidance_scale=body["guidance_scale"],
        width_px=width_px,
        height_px=height_px,
    )
    return [replace(first, seed=first.seed + index) for index in range(body["n"])]


def num_pictures(arrivals: Sequence[Arrival]) -> int:
    return sum(arrival.body["n"] for arrival in arrivals)


def make_client() -> httpx.AsyncClient:
    """A client that opens as many connections as there are requests, and knows no proxy."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(limits=limits, timeout=httpx.Timeout(TIMEOUT_S), trust_env=False)


async def ask(client: httpx.AsyncClient, address: str, body: dict[str, Any]) -> Answer:
    """Send one request and read its pictures; whatever goes wrong is named in `error`."""
    start = time.perf_counter()
    try:
        answer = await client.post(address, json=body)
        content = answer.content
    except httpx.HTTPError as broken:
        return Answer(time.perf_counter() - start, (), type(broken).__name__)
    latency_s = time.perf_counter() - start
    if answer.status_code != 200:
        return Answer(latency_s, (), f"{answer.status_code} {content[:200].decode(errors='replace')}")
    pictures = tuple(base64.b64decode(picture["b64_json"]) for picture in answer.json()["data"])
    error = "" if len(pictures) == body["n"] else f"{len(pictures)} of {body['n']} pictures"
    return Answer(latency_s, pictures, error)


async def ask_all(
    address: str, bodies: Sequence[dict[str, Any]], num_clients: int, notify: Callable[[int], None] | None = None
) -> tuple[list[Answer], float]:
    """Closed loop: each client sends the next request when its last one is answered. Returns answers and seconds."""
    answers: dict[int, Answer] = {}
    waiting = iter(range(len(bodies)))

    async def work(client: httpx.AsyncClient) -> None:
        for index in waiting:
            answers[index] = await ask(client, address, bodies[index])
            if notify is not None:
                notify(len(answers))

    async with make_client() as client:
        start = time.perf_counter()
        await asyncio.gather(*(work(client) for _ in range(num_clients)))
        elapsed_s = time.perf_counter() - start
    return [answers[index] for index in range(len(bodies))], elapsed_s


def largest_difference(files: Sequence[bytes], pictures: Sequence[Image.Image]) -> int:
    """Largest difference of any value of any pixel between PNG files and pictures, in levels of 255."""
    if len(files) != len(pictures):
        return 255
    largest = 0
    for file, picture in zip(files, pictures, strict=True):
        one = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"), np.int16)
        other = np.asarray(picture.convert("RGB"), np.int16)
        if one.shape != other.shape:
            return 255
        largest = max(largest, int(np.abs(one - other).max()))
    return largest


def slope_per_1000(counts: Sequence[int], values: Sequence[float]) -> float:
    """Growth of `values` for 1,000 of `counts`: the median of all pairs' slopes (Theil 1950), deaf to single jumps."""
    pairs = [(i, j) for i in range(len(counts)) for j in range(i) if counts[i] != counts[j]]
    return 1000 * float(np.median([(values[i] - values[j]) / (counts[i] - counts[j]) for i, j in pairs]))
