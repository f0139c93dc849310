"""The worlds of the demo: their pictures as files that arrive in a folder, and how well a model draws their words.

The pictures of a world are written as a user's would lie there, a caption in a text file beside each. Adherence is read
off the pixels (`components/emblem_reader.py`): a picture counts when it shows everything that its caption says. The
captions asked for are of another seed than those that were written.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from components.emblems import example, parse_caption
from components.sources import EmblemSource
from flows.config import Config
from flows.models import resolve_model

if TYPE_CHECKING:
    from PIL import Image

    from components.metrics import Estimate

ASKED_SEED = 20_000
"""Of the captions that are asked for; `data.source` uses small ones."""


def write_world(folder: Path, world: EmblemSource) -> int:
    """Write the pictures of a world, each with its caption beside it; those that are there stay. Returns how many came.

    A caption is written before its picture, so that a picture never stands without one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = 0
    for index in range(world.count):
        path = folder / f"{world.world}-{world.seed}-{index:05d}.png"
        if path.exists():
            continue
        picture, caption = example(world.world, world.seed, index)
        path.with_suffix(".txt").write_text(caption + "\n")
        draft = path.with_suffix(".part")
        picture.save(draft, format="PNG")
        draft.rename(path)
        written += 1
    return written


def captions_of(world: str, count: int) -> list[str]:
    """Captions of a world that no picture written here has been drawn for."""
    return [example(world, ASKED_SEED, index)[1] for index in range(count)]


def adherence(config: Config, model: str, world: str, count: int) -> "Estimate":
    """Draw `count` captions of a world with a model, with the same seeds for every model; the share that is shown."""
    from components.emblem_reader import shows
    from components.metrics import proportion_wilson
    from components.models import load_parts
    from components.sampler import PictureRequest, draw

    parts = load_parts(resolve_model(config, model).directory)
    captions = captions_of(world, count)
    serve, side = config.serve, config.data.resolution_px
    wishes = [
        PictureRequest(caption, seed, serve.default_steps, serve.default_guidance_scale, width_px=side, height_px=side)
        for seed, caption in enumerate(captions)
    ]
    emblems = [parse_caption(caption) for caption in captions]
    pairs = zip(draw(parts, wishes), emblems, strict=True)
    return proportion_wilson(sum(emblem is not None and shows(picture, emblem) for picture, emblem in pairs), count)


def draw_pairs(
    before: Sequence[str], after: Sequence[str], prompts: Sequence[str], names: tuple[str, str]
) -> "Image.Image":
    """Put what two models drew for the same prompts and seeds into one picture; `names` are those of the models."""
    from PIL import Image

    from components.report import draw_grid

    pairs = [
        [Image.open(path).convert("RGB") for path in (first, second)]
        for first, second in zip(before, after, strict=True)
    ]
    return draw_grid(pairs, prompts, names)
