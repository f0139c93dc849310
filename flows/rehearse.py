"""Start a candidate on the real serving path, beside what serves, and see whether it answers as it should.

The replica, the HTTP routes and the loading code are those of `fresco serve`; only the port and the application's name
are its own. What it answers is compared with what the sampler draws in this process. It is ended whatever happens.
"""

import base64
import io
import shutil
import time
from typing import Any

import numpy as np
from PIL import Image

from cluster.artifacts import open_workspace
from cluster.carry import Carry
from cluster.errors import EndpointError
from cluster.serving import ModelSource, endpoint, replica_memory_bytes
from components.errors import NonFiniteError
from components.evidence import Served
from flows.config import Config
from flows.console import say
from flows.generate import post
from flows.loaded_model import load_serving_parts
from flows.models import ResolvedModel
from flows.paint import FACTORY, painter_arguments

APPLICATION = "fresco-gate"
PROMPTS = ("a small red circle on a blue background", "two large outlined stars ☀", "x")
"""Plain, outside ASCII, and as short as can be: what must be answered whatever the model has learned."""
SEED = 7


def rehearse(config: Config, model: ResolvedModel) -> Served:
    """Serve the model, ask for the fixed prompts one by one, compare, end it; a failure is told in `problem`."""
    device = "cuda" if config.serve.gpus_per_replica else "cpu"
    # Reached from this machine only and asked by this verb only: no keys, nothing refused, nothing for the monitor.
    alone = {"host": "127.0.0.1", "port": 0, "api_keys_file": "", "capture_share": 0.0, "otlp_endpoint": ""}
    alone |= {"min_replicas": 1, "max_replicas": 1}
    # Calls of the sampler's own shapes, plain: others round differently, by levels of 255 in bf16. What cannot be
    # compiled serves all the same.
    plain = {"row_buckets": (), "compile": False}
    settings = config.serve.model_copy(update={**alone, **plain, "blocklist_file": "", "safety_classifier": ""})
    arguments = painter_arguments(config.model_copy(update={"serve": settings}), model, device)
    workspace = open_workspace(config.workspace)
    source = ModelSource(
        FACTORY, arguments, config.name, str(workspace.root), carry=Carry.of(keep=[workspace.captured])
    )
    say(f"starting {model.name} on the serving path, beside what serves")
    began = time.monotonic()
    try:
        with endpoint(source, settings, config.placement, APPLICATION) as url:
            ready = time.monotonic()
            served = [_ask(url, prompt) for prompt in PROMPTS]
            answered = time.monotonic()
            memory_bytes = replica_memory_bytes(APPLICATION)
        sampled = _sample(model, [picture.size for picture in served], settings, device)
    except (EndpointError, NonFiniteError) as error:
        return Served(problem=str(error), ready_s=time.monotonic() - began)
    finally:
        shutil.rmtree(workspace.root / "serving" / APPLICATION, ignore_errors=True)
    return Served(
        ready_s=ready - began,
        answer_s=answered - ready,
        pictures=len(served),
        largest_difference=max(largest_difference(*pair) for pair in zip(served, sampled, strict=True)),
        memory_bytes=memory_bytes,
    )


def largest_difference(one: Image.Image, other: Image.Image) -> int:
    """Largest difference of any value of any pixel, in levels of 255; 255 for pictures of other sizes."""
    if one.size != other.size:
        return 255
    pixels = (np.asarray(picture.convert("RGB"), np.int16) for picture in (one, other))
    return int(np.abs(next(pixels) - next(pixels)).max())


def _ask(url: str, prompt: str) -> Image.Image:
    answer = post(f"{url}/v1/images/generations", {"prompt": prompt, "seed": SEED})
    return Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))).convert("RGB")


def _sample(model: ResolvedModel, sizes: list[tuple[int, int]], settings: Any, device: str) -> list[Image.Image]:
    """What the sampler draws here for the same requests, one by one as the replica did."""
    from components.sampler import PictureRequest, draw

    parts = load_serving_parts(model.directory, device, settings.precision)
    how = {"seed": SEED, "steps": settings.default_steps, "guidance_scale": settings.default_guidance_scale}
    rows = zip(PROMPTS, sizes, strict=True)
    requests = [PictureRequest(prompt, **how, width_px=width, height_px=height) for prompt, (width, height) in rows]
    return [draw(parts, [request])[0] for request in requests]
