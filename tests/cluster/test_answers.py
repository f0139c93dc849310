"""How pictures are handed over: in the body or by address, with what drew them in headers that HTTP can carry."""

import asyncio
import base64
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from cluster import sse
from cluster.answers import answer, headers_of, write_events
from cluster.images_schema import ImagesRequest, make_order
from cluster.painter_contract import Finished, Job, Partial
from cluster.placement import ServeSection

INFO = {"width_px": 16, "height_px": 24, "size_multiple_px": 8, "min_side_px": 16}
FACTS = {"model_version": 7, "dataset": "emblèmes@0123", "run_id": None}
FINISHED = Finished((b"one", b"two"), "32x48", FACTS, ())


def test_pictures_are_in_the_body_or_behind_addresses_each_with_its_seed() -> None:
    order = make_order(ImagesRequest(prompt="x", n=2, seed=5), ServeSection(), INFO)
    inside = answer(order, FINISHED, None)
    assert [base64.b64decode(entry["b64_json"]) for entry in inside["data"]] == [b"one", b"two"]
    assert inside["size"] == "32x48" and inside["seeds"] == [5, 6] and inside["dataset"] == "emblèmes@0123"
    outside = answer(order, FINISHED, lambda content: f"http://here/{content.decode()}")
    assert [entry["url"] for entry in outside["data"]] == ["http://here/one", "http://here/two"]
    assert all("b64_json" not in entry for entry in outside["data"])


def test_headers_are_ascii_and_leave_out_what_is_not_known() -> None:
    assert headers_of(FACTS) == {"x-fresco-model-version": "7", "x-fresco-dataset": "embl%C3%A8mes@0123"}


class Drawn:
    """A drawing whose events are there already."""

    async def __aiter__(self) -> AsyncIterator[Any]:
        for event in (Partial(1, 0, b"early"), FINISHED):
            yield event

    def close(self) -> None: ...


def test_streamed_pictures_are_written_outside_of_the_event_loop_in_their_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order = make_order(ImagesRequest(prompt="x", n=2, seed=5, stream=True), ServeSection(), INFO)
    writers: list[threading.Thread] = []

    def write(name: str, data: Any) -> bytes:
        writers.append(threading.current_thread())
        return f"{name} {data['index']} {data['seed']}".encode()

    monkeypatch.setattr(sse, "write_event", write)
    finished: list[Finished] = []

    async def read() -> list[bytes]:
        events = write_events(Drawn(), Job("r", order), "image_generation", finished.append)  # type: ignore[arg-type]
        return [event async for event in events]

    partial, completed = "image_generation.partial_image", "image_generation.completed"
    assert [event.decode() for event in asyncio.run(read())] == [
        f"{partial} 1 6",
        f"{completed} 0 5",
        f"{completed} 1 6",
    ]
    assert len(writers) == 3 and threading.main_thread() not in writers and finished == [FINISHED]
