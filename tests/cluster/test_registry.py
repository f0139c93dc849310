"""The registry on a real SQLite store: versions, their lineage, and where their weights are."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from cluster.artifacts import Workspace, open_workspace
from cluster.errors import RegistryError
from cluster.registry import CHAMPION, TAG_DATASET, TAG_MODEL_FINGERPRINT, TAG_RUN, Registry


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An initialised database, made once: its 40 migrations take a second and a half."""
    workspace = open_workspace(str(tmp_path_factory.mktemp("registry")))
    Registry(workspace).register("warm-up", make_run(workspace, "w"), tags("w"))
    return workspace.root / "mlflow.db"


@pytest.fixture
def workspace(store: Path, tmp_path: Path) -> Workspace:
    shutil.copy(store, tmp_path / "mlflow.db")
    return open_workspace(str(tmp_path))


def make_run(workspace: Workspace, run_id: str) -> Path:
    pipeline = workspace.run_dir(run_id) / "pipeline"
    pipeline.mkdir(parents=True)
    return pipeline


def tags(run_id: str) -> dict[str, str]:
    return {TAG_RUN: run_id, TAG_MODEL_FINGERPRINT: f"weights of {run_id}", TAG_DATASET: "emblems@0123456789ab"}


def test_registry_nobody_wrote_to_is_empty_and_stays_unmade(tmp_path: Path) -> None:
    registry = Registry(open_workspace(str(tmp_path)))
    assert registry.by_alias("fresco", CHAMPION) is None
    assert registry.versions("fresco") == []
    with pytest.raises(RegistryError, match=r"models:/fresco/1 expected .*found versions: none"):
        registry.by_number("fresco", 1)
    assert not (tmp_path / "mlflow.db").exists()


def test_register_numbers_versions_and_keeps_lineage(workspace: Workspace) -> None:
    registry = Registry(workspace)
    first = registry.register("fresco", make_run(workspace, "a"), tags("a"), mlflow_run_id="0" * 32)
    second = registry.register("fresco", make_run(workspace, "b"), tags("b"))
    assert (first.number, second.number) == (1, 2)
    assert [version.number for version in registry.versions("fresco")] == [1, 2]
    read = Registry(workspace).by_number("fresco", 2)
    assert read.tags[TAG_DATASET] == "emblems@0123456789ab" and read.tags[TAG_RUN] == "b"
    assert registry.directory_of(read) == workspace.run_dir("b") / "pipeline"


def test_register_of_the_same_run_returns_the_version_there_is(workspace: Workspace) -> None:
    registry = Registry(workspace)
    pipeline = make_run(workspace, "a")
    assert registry.register("fresco", pipeline, tags("a")) == registry.register("fresco", pipeline, tags("a"))
    assert len(registry.versions("fresco")) == 1


def test_version_that_a_repeated_request_made_twice_is_one_for_everybody(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's client sends a POST again whose answer was lost; the second call stands for that."""
    create = MlflowClient.create_model_version

    def twice(*given: Any, **named: Any) -> Any:
        create(*given, **named)
        return create(*given, **named)

    monkeypatch.setattr(MlflowClient, "create_model_version", twice)
    registry = Registry(workspace)
    pipeline = make_run(workspace, "a")
    assert registry.register("fresco", pipeline, tags("a")).number == 1
    assert registry.register("fresco", pipeline, tags("a")).number == 1


def test_directory_is_found_after_the_workspace_moved_and_missed_when_it_is_gone(
    workspace: Workspace, tmp_path_factory: pytest.TempPathFactory
) -> None:
    Registry(workspace).register("fresco", make_run(workspace, "a"), tags("a"))
    moved = open_workspace(str(tmp_path_factory.mktemp("elsewhere") / "moved"))
    shutil.copytree(workspace.root, moved.root, dirs_exist_ok=True)
    shutil.rmtree(workspace.runs)
    registry = Registry(moved)
    version = registry.by_number("fresco", 1)
    assert registry.directory_of(version) == moved.run_dir("a") / "pipeline"
    shutil.rmtree(moved.runs)
    with pytest.raises(RegistryError, match="put it back or promote another run"):
        registry.directory_of(version)


def test_model_name_the_store_refuses_is_a_registry_error(workspace: Workspace) -> None:
    with pytest.raises(RegistryError, match="model registry expected to answer"):
        Registry(workspace).register("", make_run(workspace, "a"), tags("a"))


def test_registry_leaves_no_global_state_and_switches_telemetry_off(workspace: Workspace) -> None:
    import mlflow

    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    Registry(workspace).register("fresco", make_run(workspace, "a"), tags("a"))
    assert (mlflow.get_tracking_uri(), mlflow.get_registry_uri()) == before
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_set_alias_points_moves_and_removes(workspace: Workspace) -> None:
    registry = Registry(workspace)
    for run_id in ("a", "b"):
        registry.register("fresco", make_run(workspace, run_id), tags(run_id))
    for number in (1, 2, None, None):
        registry.set_alias("fresco", CHAMPION, number)
        found = registry.by_alias("fresco", CHAMPION)
        assert (found.number if found else None) == number


def test_tags_are_added_to_a_version_and_a_long_text_is_cut_to_what_mlflow_keeps(workspace: Workspace) -> None:
    registry = Registry(workspace)
    version = registry.register("fresco", make_run(workspace, "a"), tags("a"))
    registry.tag(version, {"fresco.decision": "hold", "fresco.scorecard": "x" * 9000})
    read = registry.by_number("fresco", 1).tags
    assert read["fresco.decision"] == "hold" and set(read["fresco.scorecard"]) == {"x"} and read[TAG_RUN] == "a"


def test_nothing_of_a_model_is_copied_into_the_registry_and_nothing_is_pickled(workspace: Workspace) -> None:
    pipeline = make_run(workspace, "with spaces ü")
    (pipeline / "weights.safetensors").write_bytes(b"0" * 100_000)
    version = Registry(workspace).register("fresco", pipeline, tags("a"))
    assert version.source == str(pipeline) and Registry(workspace).directory_of(version) == pipeline
    copies = [path for path in workspace.root.rglob("*") if path.is_file() and "weights" in path.name]
    assert copies == [pipeline / "weights.safetensors"]
    assert not [path for path in workspace.root.rglob("*") if path.suffix in (".pkl", ".pickle", ".pt", ".bin")]
