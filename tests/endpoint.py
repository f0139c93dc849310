"""The endpoint without Ray: the real routes, engine and models behind uvicorn on a free port of this process."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from cluster.drawing_routes import Desk
from cluster.images_api import make_app
from cluster.painter_bridge import PainterBridge
from cluster.painter_loading import Follow
from cluster.placement import ServeSection
from components.models import embedded_clip

FACTS = {"name": "fresco", "model_version": 4, "dataset": "emblems@0123456789ab", "run_id": "fresco-abc", "created": 5}
READY_LIMIT_S = 200.0
VERSION_FIELDS = ("challenger_share", "shadow_share", "memory_headroom_bytes")


def painter_arguments(
    pipeline: Path, keys: Path, limits: ServeSection, resolution_px: int = 32, **facts: Any
) -> dict[str, Any]:
    """What `flows.paint.make_painter` is given, for a diffusers directory and a folder of keys."""
    model = {"directory": str(pipeline), "device": "cpu", "resolution_px": resolution_px, "fallback_px": 16}
    engine = {"max_batch_rows": limits.max_batch_rows, "max_waiting_rows": limits.max_queue, "strict": limits.strict}
    safety = {"blocklist_file": limits.blocklist_file, "classifier": limits.safety_classifier}
    return {
        "model": {**model, "facts": {**FACTS, **facts}},
        "limits": {**engine, "max_cached_prompts": limits.max_cached_prompts},
        "versions": {name: getattr(limits, name) for name in VERSION_FIELDS},
        "safety": {**safety, "options": limits.safety_options},
        "keys": str(keys),
        "clip": str(embedded_clip()),
    }


def wait_for(condition: Callable[[], Any], limit_s: float = READY_LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        threading.Event().wait(0.005)


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """Serve an ASGI application on a free port; yields its URL."""
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)


@contextmanager
def open_desk(
    pipeline: Path,
    folder: Path,
    limits: ServeSection,
    follow: Follow | None = None,
    factory: str = "flows.paint:make_painter",
    **more: Any,
) -> Iterator[Desk]:
    """What the routes draw with, once it is ready: a diffusers directory behind an engine, `folder` as workspace."""
    arguments = painter_arguments(pipeline, folder / "keys", limits, **more)
    bridge = PainterBridge(factory, arguments, follow)
    desk = Desk(bridge, limits, "fresco", folder)
    try:
        wait_for(lambda: bridge.state != "loading")
        assert bridge.state == "ready", bridge.error
        yield desk
    finally:
        bridge.close()
        desk.close()


@dataclass(frozen=True)
class Endpoint:
    url: str
    desk: Desk

    @property
    def painter(self) -> Any:
        return self.desk.bridge.painter

    @property
    def engine(self) -> Any:
        return self.painter.engine


@contextmanager
def endpoint(pipeline: Path, folder: Path, limits: ServeSection, **more: Any) -> Iterator[Endpoint]:
    """A desk behind the real routes on a socket."""
    with open_desk(pipeline, folder, limits, **more) as desk, listening(make_app(desk)) as url:
        yield Endpoint(url, desk)
