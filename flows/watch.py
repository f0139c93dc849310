"""What is looked at while training: the deterministic validation loss, and pictures of fixed prompts and seeds.

All ranks share the work and call the engine equally often, so both run under every ZeRO stage. The pictures of step 0
are kept, and every later sheet shows them beside the new ones.

Shape letters: B samples, C channels, H, W latent height and width, K timestep bands.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cluster import stage, telemetry, workers
from components.batches import Captions, SplitData, cached_captions, live_captions
from components.dataset import load_dataset
from components.encode import open_latents, open_text
from components.models import Parts, TextStates, decode_latents, load_parts
from components.objective import Objective, per_image_losses
from components.replay import tell_apart
from components.report import draw_grid
from components.sampler import PictureRequest, sample_latents, to_images
from flows.encode import EncodedPaths
from flows.job import Job

NUM_PROMPTS = 8
FIRST_PICTURES = "first-pictures.png"
Forward = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def load_split(paths: EncodedPaths, dataset_dir: Path, split: str, parts: Parts, old: Path | None = None) -> SplitData:
    """Open one split: latents from the cache, captions from the cache or, for a training text encoder, as tokens.

    `old` is the dataset version whose pictures count as old ones, where the run tells old from new.
    """
    items = load_dataset(dataset_dir).split(split)
    captions = [item.caption for item in items]
    source: Captions
    if split in paths.text:
        source = cached_captions(open_text(paths.text[split]))
    else:
        source = live_captions(parts, captions)
    keys = [item.sha256 for item in items]
    told = tell_apart(keys, {item.sha256 for item in load_dataset(old).items}) if old is not None else None
    return SplitData(keys, open_latents(paths.latents[split]), source, told)


@dataclass
class Watch:
    """Measures and draws at one step; every rank holds one."""

    parts: Parts
    objective: Objective
    here: workers.WorkerContext
    directory: Path
    data: SplitData
    prompts: list[tuple[int, str]]
    """(row of the validation split, caption) of the prompts drawn."""
    steps: int
    guidance_scale: float
    num_images: int

    @staticmethod
    def open(job: Job, parts: Parts, objective: Objective, here: workers.WorkerContext) -> "Watch":
        """Load what is needed beside the trained model: the validation split and the autoencoder."""
        data = load_split(job.data, job.dataset, "validation", parts, job.old)
        items = load_dataset(job.dataset).split("validation")
        distinct = {item.caption: row for row, item in reversed(list(enumerate(items)))}
        prompts = sorted((row, caption) for caption, row in distinct.items())[:NUM_PROMPTS]
        vae = load_parts(job.base, only={"vae"}).vae
        return Watch(
            parts=parts.with_modules(vae=vae),
            objective=objective,
            here=here,
            directory=job.directory / "samples",
            data=data,
            prompts=prompts,
            steps=job.config.evaluate.sampling_steps,
            guidance_scale=job.config.evaluate.guidance_scale,
            num_images=min(job.config.train.eval_images, len(items)),
        )

    def look(self, forward: Forward) -> dict[str, float]:
        """Return the validation loss, whole and by band; of old and of new pictures where they differ. Collective."""
        with torch.no_grad():
            losses = self.losses(forward)
        numbers = {telemetry.EVAL_LOSS: float(losses.mean())}
        numbers |= {f"{telemetry.EVAL_LOSS}_band_{k}": float(loss) for k, loss in enumerate(losses.mean(axis=0))}
        parts = self.data.parts
        for name, rows in (("old", parts.old_rows), ("new", parts.new_rows)) if parts is not None else ():
            measured = losses[rows[rows < self.num_images]]
            if len(measured):
                numbers[f"{telemetry.EVAL_LOSS}_{name}"] = float(measured.mean())
        return numbers

    def losses(self, forward: Forward) -> np.ndarray:
        """Return per-image losses (N, K) of the first pictures of the split, the same on every rank. Collective."""
        world = self.here.world_size
        share = -(-self.num_images // world)
        # Every rank measures equally many; the last share is filled with repeats that are dropped below.
        rows = [min(self.here.rank * share + i, self.num_images - 1) for i in range(share)]
        own = per_image_losses(
            self.objective,
            self._predict(forward),
            self.data.latents.mean[rows],
            [self.data.keys[row] for row in rows],
            lambda chosen: self.data.captions.at([rows[i] for i in chosen]),
        )
        return np.concatenate(workers.gather(own))[: self.num_images]

    @property
    def first_pictures(self) -> Path:
        """The pictures before training, which every sheet repeats."""
        return self.directory / FIRST_PICTURES

    @torch.no_grad()
    def draw(self, step: int, forward: Forward) -> None:
        """Draw the fixed prompts, ranks taking turns; rank 0 writes the sheet beside step 0's pictures. Collective."""
        world = self.here.world_size
        share = -(-len(self.prompts) // world)
        own = [(self.here.rank * share + i) % len(self.prompts) for i in range(share)]
        factor = 2 ** (len(self.parts.vae.config.block_out_channels) - 1)
        height, width = (side * factor for side in self.data.latents.mean.shape[-2:])
        requests = [
            PictureRequest(
                self.prompts[i][1],
                seed=i,
                steps=self.steps,
                guidance_scale=self.guidance_scale,
                width_px=width,
                height_px=height,
            )
            for i in own
        ]
        rows = [self.prompts[i][0] for i in own]
        text = self.data.captions.at(rows)
        empty = self.data.captions.at(rows, np.ones(len(rows), dtype=bool))
        latents_BCHW = sample_latents(self.parts, self._predict(forward), requests, text, empty)
        gathered = workers.gather((own, latents_BCHW.cpu().numpy()))
        if self.here.rank == 0:
            by_prompt = {i: latents for indexes, part in gathered for i, latents in zip(indexes, part, strict=True)}
            stacked = torch.from_numpy(np.stack([by_prompt[i] for i in range(len(self.prompts))]))
            self._write_sheet(step, to_images(decode_latents(self.parts.vae, stacked)))

    def picture_path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}.png"

    def _write_sheet(self, step: int, pictures: list[Image.Image]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        first = self.first_pictures
        width, height = pictures[0].size
        if step == 0 or not stage.fetch(first):
            strip = Image.new("RGB", (width * len(pictures), height))
            for i, picture in enumerate(pictures):
                strip.paste(picture, (i * width, 0))
            strip.save(first)
            stage.keep(first)
        strip = Image.open(first)
        before = [strip.crop((i * width, 0, (i + 1) * width, height)) for i in range(len(pictures))]
        captions = [caption for _, caption in self.prompts]
        rows: Any = [[picture] for picture in before] if step == 0 else list(zip(before, pictures, strict=True))
        headings = ["step 0"] if step == 0 else ["step 0", f"step {step}"]
        draw_grid(rows, captions, headings).save(self.picture_path(step))

    def _predict(self, forward: Forward) -> Callable[[Tensor, Tensor, TextStates], Tensor]:
        device = self.here.device

        def predict(latents_BCHW: Tensor, timestep_B: Tensor, text: TextStates) -> Tensor:
            return forward(
                latents_BCHW.to(device), timestep_B.to(device), text.states_BLD.to(device), text.mask_BL.to(device)
            ).float()

        return predict
