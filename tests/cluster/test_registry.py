"""The registry on a real SQLite store: versions, lineage, aliases, and what happens when two people promote."""

import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

from cluster.artifacts import Workspace, open_workspace
from cluster.errors import RegistryError
from cluster.registry import CHAMPION, PREVIOUS, TAG_DATASET, TAG_MODEL_FINGERPRINT, TAG_RUN, TAG_SINCE, Registry


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


def _promote(root: str, number: int) -> None:
    Registry(open_workspace(root)).move_champion("fresco", number, f"promoter {number}")


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


def test_move_champion_keeps_the_old_one_as_previous(workspace: Workspace) -> None:
    registry = Registry(workspace)
    for run_id in ("a", "b"):
        registry.register("fresco", make_run(workspace, run_id), tags(run_id))
    first = registry.move_champion("fresco", 1, "test")
    assert first.changed and first.champion.number == 1 and first.previous is None
    second = registry.move_champion("fresco", 2, "test")
    assert second.champion.number == 2 and second.previous is not None and second.previous.number == 1
    assert second.champion.tags[TAG_SINCE].endswith("Z")
    seen = Registry(workspace)
    champion, previous = seen.by_alias("fresco", CHAMPION), seen.by_alias("fresco", PREVIOUS)
    assert champion is not None and champion.number == 2
    assert previous is not None and previous.number == 1


def test_move_champion_to_itself_changes_nothing(workspace: Workspace) -> None:
    registry = Registry(workspace)
    for run_id in ("a", "b"):
        number = registry.register("fresco", make_run(workspace, run_id), tags(run_id)).number
        before = registry.move_champion("fresco", number, "test")
    again = registry.move_champion("fresco", 2, "test")
    assert not again.changed
    assert (again.champion, again.previous) == (before.champion, before.previous)


def test_move_champion_to_a_missing_version_lists_those_there_are(workspace: Workspace) -> None:
    registry = Registry(workspace)
    registry.register("fresco", make_run(workspace, "a"), tags("a"))
    registry.move_champion("fresco", 1, "test")
    with pytest.raises(RegistryError, match=r"models:/fresco/7 expected .*found versions: 1;"):
        registry.move_champion("fresco", 7, "test")
    champion = registry.by_alias("fresco", CHAMPION)
    assert champion is not None and champion.number == 1


def test_two_promoters_at_once_end_in_one_order_or_the_other(workspace: Workspace) -> None:
    registry = Registry(workspace)
    for run_id in ("a", "b", "c"):
        registry.register("fresco", make_run(workspace, run_id), tags(run_id))
    registry.move_champion("fresco", 1, "test")
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=_promote, args=(str(workspace.root), number)) for number in (2, 3)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    champion, previous = registry.by_alias("fresco", CHAMPION), registry.by_alias("fresco", PREVIOUS)
    assert champion is not None and previous is not None
    assert (champion.number, previous.number) in {(2, 3), (3, 2)}


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
