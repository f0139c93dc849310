"""The peers of `benchmarks/serve.py`: diffusers' own pipeline behind Ray Serve, written as a fair engineer would.

    OneByOne  each request is one call of the pipeline (its `n` pictures together), in order of arrival
    Grouped   `@serve.batch` gathers what waits; requests of equal steps, guidance and size become one call, and each
              answer leaves with its own group, not with the whole batch

Both have what Fresco's replica has: as many torch threads as draw fastest, found by the same trial, a free event loop
(the pipeline runs in one thread of its own, PNG files are made in others), the weights loaded and a picture drawn
before the first request, a wide queue at the replica, no progress bars, and the same kind of ingress.
"""

import asyncio
import base64
import io
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from fastapi import FastAPI
from PIL import Image
from pydantic import BaseModel, Field
from ray import serve

from components.threads import settle_threads

GENERATIONS_ROUTE = "/v1/images/generations"
GATHERED = 64
"""Requests that `@serve.batch` hands over at once: with more to choose from, groups are larger."""
GATHER_WAIT_S = 0.01
"""Serve's default. A longer wait delays every request of an endpoint that is not full."""
MOST_PICTURES = 32
"""Pictures of one call; guided, that makes the 64 rows of Fresco's largest step."""
MAX_ONGOING = 1024
DRAIN_S = 5.0


class Wanted(BaseModel):
    """The part of OpenAI's request, and of what goes beyond it, that the benchmark sends."""

    prompt: str
    n: int = Field(1, ge=1)
    size: str = "64x64"
    seed: int = 0
    steps: int = Field(20, ge=1)
    guidance_scale: float = 3.0

    @property
    def key(self) -> tuple[int, float, str]:
        """What one call of the pipeline has in common."""
        return self.steps, self.guidance_scale, self.size


@dataclass(frozen=True)
class Order:
    """A request and where its pictures are waited for."""

    wanted: Wanted
    drawn: "asyncio.Future[list[Image.Image]]"


class Pipeline:
    """diffusers' pipeline with the model's own scheduler, on the CPU in fp32."""

    def __init__(self, directory: str) -> None:
        from diffusers import DiffusionPipeline
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        for logs in (diffusers_logging, transformers_logging):
            logs.disable_progress_bar()
            logs.set_verbosity_error()
        self.pipeline = DiffusionPipeline.from_pretrained(
            directory, dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
        self.pipeline.set_progress_bar_config(disable=True)

    def draw(self, group: Sequence[Wanted]) -> list[list[Image.Image]]:
        """Draw requests of one key in one call; picture i of a request comes from seed + i."""
        steps, guidance_scale, size = group[0].key
        width_px, height_px = (int(side) for side in size.split("x"))
        shape = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "width": width_px, "height": height_px}
        seeds = [wanted.seed + index for wanted in group for index in range(wanted.n)]
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        if len(group) == 1:  # its prompt is encoded once
            prompts = {"prompt": group[0].prompt, "num_images_per_prompt": group[0].n}
        else:
            prompts = {"prompt": [wanted.prompt for wanted in group for _ in range(wanted.n)]}
        pictures = iter(self.pipeline(**prompts, **shape, generator=generators).images)
        return [[next(pictures) for _ in range(wanted.n)] for wanted in group]

    def warm_up(self) -> None:
        """Draw alone and in a group, with and without guidance."""
        for wanted in (Wanted(prompt="warm up", steps=2), Wanted(prompt="warm up", steps=2, guidance_scale=1.0)):
            self.draw([wanted])
            self.draw([wanted] * 4)


class OneByOne:
    """Peer (a)."""

    def __init__(self, directory: str) -> None:
        self.pipeline = Pipeline(directory)
        settle_threads(lambda: self.pipeline.draw([Wanted(prompt="warm up", steps=2)]), len(os.sched_getaffinity(0)))
        self.pipeline.warm_up()
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pipeline")

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_app(self)

    async def draw(self, wanted: Wanted) -> list[Image.Image]:
        """Wait for the thread and draw."""
        drawn = await asyncio.get_running_loop().run_in_executor(self.thread, self.pipeline.draw, [wanted])
        return drawn[0]


class Grouped(OneByOne):
    """Peer (b)."""

    def __init__(self, directory: str) -> None:
        super().__init__(directory)
        self.batches: set[asyncio.Future[None]] = set()

    async def draw(self, wanted: Wanted) -> list[Image.Image]:
        """Join the next batch and wait for the own group."""
        order = Order(wanted, asyncio.get_running_loop().create_future())
        batch = asyncio.ensure_future(self.gather(order))
        self.batches.add(batch)  # the loop itself keeps weak references only
        batch.add_done_callback(self.batches.discard)
        try:
            return await order.drawn
        except asyncio.CancelledError:  # the client left: out of the queue, if the batch has not begun
            batch.cancel()
            raise

    @serve.batch(max_batch_size=GATHERED, batch_wait_timeout_s=GATHER_WAIT_S)
    async def gather(self, orders: list[Order]) -> list[None]:
        """Serve calls this with what has come together."""
        await self.draw_groups(orders)
        return [None] * len(orders)

    async def draw_groups(self, orders: Sequence[Order]) -> None:
        """Draw group after group, the one that waits longest first; a failed group fails its own requests."""
        loop = asyncio.get_running_loop()
        for group in group_equal(orders):
            wanted = [order.wanted for order in group]
            try:
                drawn = await loop.run_in_executor(self.thread, self.pipeline.draw, wanted)
            except Exception as error:  # whatever the pipeline raises belongs to the requests of this call alone
                for order in group:
                    if not order.drawn.done():
                        order.drawn.set_exception(error)
                continue
            for order, pictures in zip(group, drawn, strict=True):
                if not order.drawn.done():  # its client may have left
                    order.drawn.set_result(pictures)


def group_equal(orders: Sequence[Order]) -> list[list[Order]]:
    """Put requests of equal parameters together, at most MOST_PICTURES a group; groups by their first arrival."""
    groups: list[list[Order]] = []
    open_groups: dict[Any, list[Order]] = {}
    for order in orders:
        group = open_groups.get(order.wanted.key)
        if group is None or sum(other.wanted.n for other in group) + order.wanted.n > MOST_PICTURES:
            group = []
            groups.append(group)
            open_groups[order.wanted.key] = group
        group.append(order)
    return groups


def make_app(peer: OneByOne) -> FastAPI:
    """The one route of a peer, in OpenAI's shape."""
    app = FastAPI()

    @app.post(GENERATIONS_ROUTE)
    async def generate(wanted: Wanted) -> dict[str, Any]:
        pictures = await peer.draw(wanted)
        files = await asyncio.gather(*(asyncio.to_thread(encode, picture) for picture in pictures))
        return {"created": int(time.time()), "data": [{"b64_json": file} for file in files]}

    return app


def encode(picture: Image.Image) -> str:
    """Return a PNG file as base64."""
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


PEERS: Mapping[str, type[OneByOne]] = {"one-by-one": OneByOne, "grouped": Grouped}


@contextmanager
def served_peers(directory: str, cpus_per_replica: float) -> Iterator[dict[str, str]]:
    """Serve both behind one Ray Serve proxy for the length of the block; yields their URLs by name.

    Ray must run in this process. Deployment and proxy have the options that `cluster/serving.py` gives Fresco's.
    """
    from ray.serve.config import HTTPOptions, ProxyLocation
    from ray.serve.schema import LoggingConfig

    from cluster.serving import find_port

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    quiet = LoggingConfig(log_level="ERROR", enable_access_log=False)
    port = find_port("127.0.0.1", 0)
    http = HTTPOptions(host="127.0.0.1", port=port)
    serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=http, logging_config=quiet)
    try:
        for name, peer in PEERS.items():
            deployment = serve.deployment(
                name="images",
                num_replicas=1,
                max_ongoing_requests=MAX_ONGOING,
                ray_actor_options={"num_cpus": cpus_per_replica},
                graceful_shutdown_timeout_s=DRAIN_S,
                graceful_shutdown_wait_loop_s=0.2,
                logging_config=quiet,
            )
            serve.run(deployment(serve.ingress()(peer)).bind(directory), name=name, route_prefix=f"/{name}")
        yield {name: f"http://127.0.0.1:{port}/{name}" for name in PEERS}
    finally:
        serve.shutdown()
