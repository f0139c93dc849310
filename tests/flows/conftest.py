"""Finished runs with tiny real models, as `train` leaves them, for the verbs that come after it."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from cluster.artifacts import open_workspace, write_record
from cluster.errors import RegistryError
from cluster.placement import ServeSection
from cluster.registry import Registry
from components.contrastive import make_tiny_clip, save_clip
from components.emblems import example
from components.models import make_tiny, model_fingerprint, save_parts
from components.recipe import DataSection
from components.tokenizer import make_clip_tokenizer
from flows import prepare
from flows.config import Config

MakeRun = Callable[[str, int], Path]


@pytest.fixture(scope="session")
def tiny_pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Diffusers directories of the same tiny model with different random weights, by seed."""
    pipelines = {}
    for seed in (0, 1):
        pipelines[seed] = tmp_path_factory.mktemp("tiny") / "pipeline"
        save_parts(make_tiny("stable_diffusion", seed=seed), pipelines[seed])
    return pipelines


@pytest.fixture(scope="session")
def clip_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with random weights that reads emblem captions."""
    directory = tmp_path_factory.mktemp("clip")
    tokenizer = make_clip_tokenizer([example("base", 0, index)[1] for index in range(50)], 700, 32)
    save_clip(make_tiny_clip(tokenizer, seed=0), tokenizer, directory)
    return directory


@pytest.fixture
def examined_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are examined in this process instead of on Ray actors."""

    def map_here(
        blocks: Iterable[Any], make: Callable[[Any], Callable[[Any], Any]], job: Any, pool: Any, carry: Any
    ) -> Iterator[Any]:
        return map(make(job), blocks)

    monkeypatch.setattr(prepare, "map_blocks", map_here)
    monkeypatch.setattr(prepare, "local_session", lambda placement: nullcontext())


@pytest.fixture(scope="session")
def empty_registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry's database without models, made once: its migrations take two seconds."""
    workspace = open_workspace(str(tmp_path_factory.mktemp("registry")))
    registry = Registry(workspace)
    with pytest.raises(RegistryError):
        registry.register("", workspace.root, {})
    return workspace.root / "mlflow.db"


@pytest.fixture
def config(tmp_path: Path, empty_registry: Path) -> Config:
    (tmp_path / "workspace").mkdir()
    shutil.copy(empty_registry, tmp_path / "workspace" / "mlflow.db")
    serve = ServeSection(default_steps=2, max_images=3, max_steps=10, max_side_px=64, follow_s=0.5)
    return Config(workspace=str(tmp_path / "workspace"), data=DataSection(resolution_px=16), serve=serve)


@pytest.fixture
def make_run(config: Config, tiny_pipelines: dict[int, Path]) -> MakeRun:
    """Return a function that lays down a finished run (its id, the seed of its weights) and gives its directory."""

    def make(run_id: str, seed: int) -> Path:
        directory = open_workspace(config.workspace).run_dir(run_id)
        shutil.copytree(tiny_pipelines[seed], directory / "pipeline")
        record = {
            "fingerprint": f"recipe{seed:06d}",
            "inputs": {"dataset": "emblems@0123456789ab", "base": model_fingerprint(tiny_pipelines[0])},
            "config": config.model_dump(mode="json"),
            "pipeline": "pipeline",
        }
        write_record(directory, record)
        return directory

    return make
