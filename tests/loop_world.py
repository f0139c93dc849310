"""A tiny world for the standing loop: a folder where emblems arrive, and a config whose cycles take seconds."""

from pathlib import Path

import yaml

from cluster import storage
from cluster.artifacts import open_workspace
from cluster.champion import move_champion
from cluster.registry import TAG_DATASET, TAG_MODEL_FINGERPRINT, TAG_RUN, Registry
from components.emblems import example
from components.images import to_png
from components.models import model_fingerprint
from flows.config import Config, load_config


def arrive(source: str | Path, world: str, first: int, count: int) -> None:
    """Put captioned emblems into the source, a folder or an s3:// prefix."""
    for index in range(first, first + count):
        picture, caption = example(world, 5, index)
        storage.write_bytes_atomic(f"{source}/{world}-{index:04}.txt", caption.encode())
        storage.write_bytes_atomic(f"{source}/{world}-{index:04}.png", to_png(picture.resize((16, 16))))


def loop_config(folder: Path, base: Path, *overrides: str) -> Config:
    """Cycles of a few steps on one worker without DeepSpeed; arrivals count at once, no cool-down, nothing watched."""
    return load_config(
        overrides=[
            "name=loop",
            f"data.source={folder / 'source'}",
            "data.resolution_px=16",
            "data.min_side_px=8",
            "data.validation_fraction=0.2",
            "data.test_fraction=0.2",
            f"model.base={base}",
            "train.steps=6",
            "train.global_batch=4",
            "train.freezing=denoiser",
            "train.eval_every_steps=3",
            "evaluate.prompts=4",
            "evaluate.sampling_steps=2",
            "evaluate.bootstrap=100",
            "gate.min_test_pictures=2",
            "placement.workers=1",
            "placement.engine=torch",
            "placement.checkpoint_every_steps=2",
            "serve.default_steps=2",
            "monitor.settle_s=0",
            "retrain.min_new_images=10",
            "retrain.cooldown_s=0",
            "retrain.look_every_s=0.2",
            "retrain.watch_s=0",
            "retrain.lease_ttl_s=3",
            "retrain.on_drift=false",
            "retrain.max_decay=0",
            *overrides,
        ],
        workspace=str(folder / "workspace"),
    )


def crown(config: Config, pipeline: Path, run_id: str, dataset: str) -> int:
    """Register a pipeline as a run's version and make it the champion; return its number."""
    registry = Registry(open_workspace(config.workspace))
    tags = {TAG_RUN: run_id, TAG_DATASET: dataset, TAG_MODEL_FINGERPRINT: model_fingerprint(pipeline)}
    version = registry.register(config.name, pipeline, tags)
    move_champion(registry, config.name, version.number)
    return version.number


def write_config(folder: Path, config: Config) -> Path:
    """Write a config for a command of its own."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path
