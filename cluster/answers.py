"""How finished pictures are handed over: OpenAI's JSON or its stream of events, with what drew them beside.

Shapes follow ImagesResponse and the image events of OpenAI's published schema; which weights drew a picture is known
when it is finished, so a stream says it in its last events and not in its headers.
"""

import base64
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any, Literal
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool

from cluster.images_schema import Order
from cluster.painter_bridge import Drawing
from cluster.painter_contract import Finished, Job, Partial
from cluster.sse import PictureEvents

PROVENANCE = ("model_version", "dataset", "run_id")
Keep = Callable[[bytes], str]
"""Stores an encoded picture and returns its address."""


def provenance_of(info: Mapping[str, Any]) -> dict[str, Any]:
    return {key: info.get(key) for key in PROVENANCE}


def headers_of(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return what drew a picture as `x-fresco-*` headers; letters outside ASCII are percent-encoded."""
    named = {"x-fresco-" + key.replace("_", "-"): value for key, value in provenance_of(facts).items()}
    return {key: quote(str(value), safe="@:/ ") for key, value in named.items() if value is not None}


def answer(order: Order, finished: Finished, keep: Keep | None) -> dict[str, Any]:
    """Build the body of a plain answer; `keep` hands pictures out by address, None puts them into the body."""
    data = []
    for row, content in zip(order.rows, finished.contents, strict=True):
        where = {"b64_json": base64.b64encode(content).decode("ascii")} if keep is None else {"url": keep(content)}
        data.append({**where, "revised_prompt": None, "seed": row["seed"]})
    seeds = [row["seed"] for row in order.rows]
    echo = {"output_format": order.output_format, "size": finished.size, "seed": seeds[0], "seeds": seeds}
    return {"created": int(time.time()), "data": data, **echo, **provenance_of(finished.facts)}


async def write_events(
    drawing: Drawing,
    job: Job,
    route: Literal["image_generation", "image_edit"],
    on_finished: Callable[[Finished], None],
) -> AsyncIterator[bytes]:
    """Write the events of a drawing, which ends with this iterator; `on_finished` is called after the last one."""
    order = job.order
    events = PictureEvents(route, order.size, order.output_format, {"request_id": job.request_id})
    with closing(drawing):
        async for event in drawing:
            if isinstance(event, Partial):
                seed = order.rows[event.row]["seed"]
                # In a thread: encoding a large picture as JSON would hold up every other stream.
                yield await run_in_threadpool(events.partial, event.content, event.index, index=event.row, seed=seed)
                continue
            facts, done = provenance_of(event.facts), replace(events, size=event.size)
            for index, content in enumerate(event.contents):
                seed = order.rows[index]["seed"]
                yield await run_in_threadpool(done.completed, content, index=index, seed=seed, **facts)
            on_finished(event)
