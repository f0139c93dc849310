"""fresco generate: PNG files for prompts, from the workspace's endpoint, from any URL, or from a model on this machine.

A file drawn here carries its prompt, seed and model version as PNG text; one from an endpoint carries the endpoint's
signed record, which never holds the prompt. Existing files are never overwritten.
"""

import base64
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from cluster.artifacts import disk_message, open_workspace
from cluster.errors import EndpointError, StorageError
from components.errors import InputError
from flows.config import Config
from flows.console import say
from flows.serve import endpoint_of

if TYPE_CHECKING:
    from PIL.Image import Image

CONNECT_TIMEOUT_S = 10.0
DRAWING_TIMEOUT_S = 600.0
NAME_CHARS = 40
ROW_TEXTS = ("prompt", "negative_prompt", "seed", "steps", "guidance_scale")
MODEL_TEXTS = ("model_version", "dataset", "run_id")
HERE = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Wish:
    """How to draw; None takes the endpoint's default. Picture i of a prompt is drawn from seed + i."""

    n: int = 1
    seed: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    size: str | None = None
    api_key: str | None = field(default=None, repr=False)
    """Key of the endpoint; not part of what is drawn."""

    def body(self, prompt: str) -> dict[str, Any]:
        """Return the JSON body of one request."""
        fields = {"prompt": prompt, **self.__dict__}
        return {key: value for key, value in fields.items() if value is not None and key != "api_key"}


@dataclass(frozen=True)
class Drawn:
    """Pictures of one prompt with what drew them."""

    pngs: list[bytes]
    seeds: list[int]
    model_version: int | None


def run(
    config: Config,
    prompts: Sequence[str],
    out: str,
    wish: Wish = Wish(),
    model: str | None = None,
    url: str | None = None,
) -> dict[str, Any]:
    """Draw `wish.n` pictures for each prompt into `out`, a folder or the name of a .png file."""
    if not prompts:
        raise InputError(
            "generate expected at least one prompt, found none; for example: fresco generate 'a red circle'"
        )
    if model and url:
        raise InputError("generate expected --model or --url, found both; drop one")
    draw = _local(config, model) if model else _remote(config, url)
    files: list[str] = []
    seeds: list[int] = []
    for prompt in prompts:
        drawn = draw(prompt, wish)
        for png, seed in zip(drawn.pngs, drawn.seeds, strict=True):
            files.append(str(write_new(Path(out).expanduser(), prompt, seed, png)))
            version = "" if drawn.model_version is None else f", model version {drawn.model_version}"
            say(f"{files[-1]}  (seed {seed}{version})")
        seeds += drawn.seeds
    return {"files": files, "model_version": drawn.model_version, "seed": seeds[0], "seeds": seeds}


def write_new(out: Path, prompt: str, seed: int, png: bytes) -> Path:
    """Write a picture under a name nobody has: SUBJECT-seedN.png in a folder, or the file given, then -2, -3, ..."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:NAME_CHARS].strip("-") or "picture"
    folder, stem = (out.parent, out.stem) if out.suffix.lower() == ".png" else (out, f"{words}-seed{seed}")
    for number in itertools.count(1):
        path = folder / f"{stem}{'' if number == 1 else f'-{number}'}.png"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                file.write(png)
            return path
        except FileExistsError as error:
            if folder.exists() and not folder.is_dir():
                raise InputError(f"--out expected a folder or a .png file, found {str(folder)!r}, a file") from error
        except OSError as error:
            path.unlink(missing_ok=True)
            raise StorageError(disk_message(path, error)) from error
    raise AssertionError("unreachable")


def _remote(config: Config, url: str | None) -> Any:
    if url is None:
        running = endpoint_of(open_workspace(config.workspace))
        if running is None:
            raise EndpointError(
                f"endpoint expected to run for workspace {config.workspace}, found none; start it with: fresco serve"
                " --detach, or draw here with --model RUN_ID"
            )
        url = running["url"]
    address = str(url).rstrip("/").removesuffix("/v1")

    def draw(prompt: str, wish: Wish) -> Drawn:
        answer = post(f"{address}/v1/images/generations", wish.body(prompt), wish.api_key)
        pngs = [base64.b64decode(picture["b64_json"]) for picture in answer["data"]]
        return Drawn(pngs, answer["seeds"], answer["model_version"])

    return draw


def post(url: str, body: dict[str, Any], api_key: str | None = None) -> dict[str, Any]:
    """Send one request; EndpointError with the endpoint's own words when it refuses."""
    try:
        timeout = httpx.Timeout(DRAWING_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        # A proxy named in the environment must not stand between this machine and itself.
        remote = httpx.URL(url).host not in HERE
        headers = bearer(api_key)
        answer = httpx.post(url, json=body, headers=headers, timeout=timeout, trust_env=remote)
        content = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise EndpointError(
            f"endpoint expected to answer at {url}, found: {error}; is it running? (fresco status)"
        ) from error
    if answer.status_code != 200:
        said = content.get("error", {}).get("message", content) if isinstance(content, dict) else content
        raise EndpointError(f"endpoint expected to draw, found status {answer.status_code}: {said}")
    return dict(content)


def bearer(api_key: str | None) -> dict[str, str]:
    """Return the headers that present a key, none without one."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def _local(config: Config, model: str) -> Any:
    import torch

    from components.sampler import PictureRequest, draw
    from flows.loaded_model import load_model, model_arguments
    from flows.models import resolve_model

    found = resolve_model(config, model)
    told = model_arguments(config, found, "cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(**{**told, "threads": None})  # many pictures at once keep all cores busy

    def draw_here(prompt: str, wish: Wish) -> Drawn:
        from cluster.api_errors import ApiError
        from cluster.images_schema import ImagesRequest, make_rows

        try:
            rows = make_rows(ImagesRequest(**wish.body(prompt)), config.serve, loaded.info)
        except ApiError as error:
            raise InputError(error.message) from error
        pictures = draw(loaded.parts, [PictureRequest(**row) for row in rows])
        pngs = [_png(picture, row, loaded.info) for picture, row in zip(pictures, rows, strict=True)]
        return Drawn(pngs, [row["seed"] for row in rows], found.version)

    return draw_here


def _png(picture: "Image", row: Mapping[str, Any], info: Mapping[str, Any]) -> bytes:
    """Encode a picture that stays here: unlike the endpoint's, it says what was asked."""
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    for source, keys in ((row, ROW_TEXTS), (info, MODEL_TEXTS)):
        for key in keys:
            texts.add_text(key, str("" if source[key] is None else source[key]))
    file = io.BytesIO()
    picture.save(file, format="PNG", pnginfo=texts)
    return file.getvalue()
