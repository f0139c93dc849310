"""What lies on top of a stage: checkpoints, logs, captured shards and the registry, as another machine finds them."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from cluster import stage, telemetry, whole_folders
from cluster.artifacts import read_journal, read_json
from cluster.capture import SCHEMA, read_captured, remove_oldest
from cluster.champion import move_champion, roll_back, settle
from cluster.checkpoints import CheckpointReader, CheckpointWriter, newest_complete, read_state
from cluster.errors import RegistryError, StorageError
from cluster.fencing import peek_fenced, write_fenced
from cluster.lease import hold_lease, read_lease
from cluster.registry import CHAMPION, TAG_MODEL_FINGERPRINT, TAG_RUN, Registry
from cluster.reigns import PROMOTE
from tests.faults import RESET, Network, Rule
from tests.machines import Machines


def tensors(step: int) -> Iterator[tuple[str, Tensor]]:
    yield from ((f"layer.{number}|master", torch.full((4,), float(step + number))) for number in range(3))


def save(directory: Path, step: int, world: int = 2, ranks: tuple[int, ...] = (1, 0), keep: int = 2) -> None:
    for rank in ranks:
        writer = CheckpointWriter(directory, rank, world, keep)
        writer.save(step, tensors(step), {"step": step})
        writer.close()


def test_another_machine_continues_from_the_newest_checkpoint_that_is_all_there(machines: Machines) -> None:
    directory = machines.be("one").run_dir("r") / "checkpoints"
    directory.mkdir(parents=True)
    directory.with_name("metrics.jsonl").write_text('{"step": 4}\n')
    save(directory, 4)
    save(directory, 8, ranks=(1,))
    other = machines.be("two").run_dir("r") / "checkpoints"
    newest = newest_complete(other)
    assert newest is not None and newest.name == "step-00000004" and read_state(newest) == {"step": 4}
    reader = CheckpointReader(newest)
    assert all(torch.equal(reader.get(key), value) for key, value in tensors(4))
    assert stage.fetch(directory.with_name("metrics.jsonl")), "the lines before a checkpoint go with it"


def test_a_checkpoint_that_only_this_machine_has_counts_for_no_rank(machines: Machines, s3_network: Network) -> None:
    directory = machines.be("one").run_dir("r") / "checkpoints"
    save(directory, 4, world=1, ranks=(0,))
    s3_network.plan(Rule(RESET, 100, "PUT .*step-00000008/state"))
    with pytest.raises(StorageError, match=r"step-00000008/state-0\.json"):
        save(directory, 8, world=1, ranks=(0,))
    s3_network.plan()
    newest = newest_complete(directory)
    assert newest is not None and newest.name == "step-00000004"


def test_old_checkpoints_go_from_the_bucket_too(machines: Machines) -> None:
    directory = machines.be("one").run_dir("r") / "checkpoints"
    for step in (4, 8, 12):
        save(directory, step, world=1, ranks=(0,), keep=1)
    kept = stage.folders(machines.be("two").run_dir("r") / "checkpoints")
    assert [path.name for path in kept] == ["step-00000012"]


def test_a_log_is_continued_on_another_machine(machines: Machines, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    one = machines.be("one").run_dir("r")
    run_id = telemetry.start_run(uri, "test", "r", {}, tmp_path / "files")
    log = telemetry.RunLog(one, uri, run_id, 0)
    log.write({"step": 0, "eval/loss": 1.0})
    log.flush()
    log.write({"step": 3, "train/loss": 0.9})
    stage.keep(one / "metrics.jsonl")  # as a checkpoint of step 4 does
    other = machines.be("two").run_dir("r")
    telemetry.RunLog(other, uri, run_id, 4).write({"step": 5, "train/loss": 0.8})
    lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 3, 5]


def shard(seconds: float) -> bytes:
    row = dict.fromkeys(SCHEMA.names) | {"time_s": seconds, "image_features": np.zeros(256, np.float32)}
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([row], schema=SCHEMA), buffer)
    content: bytes = buffer.getvalue().to_pybytes()
    return content


def test_captured_shards_of_all_machines_are_read_and_bounded_together(machines: Machines) -> None:
    for number, name in enumerate(("one", "two", "one", "two")):
        stage.write(machines.be(name).captured / f"2026010{number}T000000-x.parquet", shard(number))
    folder = machines.be("three").captured
    assert read_captured(folder)["time_s"].to_pylist() == [0, 1, 2, 3]
    size = len(shard(0))
    remove_oldest(folder, 2 * size + size // 2)
    assert read_captured(machines.be("four").captured)["time_s"].to_pylist() == [2, 3]


def register(machines: Machines, machine: str, uri: str, run_id: str) -> int:
    workspace = machines.be(machine)
    pipeline = workspace.run_dir(run_id) / "pipeline"
    pipeline.mkdir(parents=True)
    (pipeline / "model_index.json").write_text(run_id)
    whole_folders.keep_whole(pipeline)
    tags = {TAG_RUN: run_id, TAG_MODEL_FINGERPRINT: f"weights {run_id}"}
    return Registry(workspace, uri).register("fresco", pipeline, tags).number


def test_what_one_machine_promotes_another_finds_serves_and_undoes(
    machines: Machines, tmp_path: Path, s3_network: Network
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert [register(machines, name, uri, name) for name in ("one", "two")] == [1, 2]
    for name, number in (("one", 1), ("two", 2)):
        move_champion(
            Registry(machines.be(name), uri), "fresco", number, {"report": f"{machines.be(name).root}/x.html"}
        )
        shutil.rmtree(machines.be(name).root)
    registry = Registry(machines.be("three"), uri)
    champion = registry.by_alias("fresco", CHAMPION)
    assert champion is not None and champion.number == 2
    assert champion.source == f"{machines.uri}/runs/two/pipeline"
    directory = registry.directory_of(champion)
    assert directory.is_relative_to(registry.workspace.root)
    assert (directory / "model_index.json").read_text() == "two"
    assert roll_back(registry, "fresco", {}).champion.number == 1
    lines = read_journal(machines.be("four"))
    assert [(line["event"], line["champion"]) for line in lines] == [(PROMOTE, 1), (PROMOTE, 2), ("rollback", 1)]
    assert lines[0]["report"] == f"{machines.uri}/x.html"
    assert settle(Registry(machines.be("four"), uri), "fresco") == []


def test_a_move_that_was_cut_off_is_finished_by_another_machine(
    machines: Machines, tmp_path: Path, s3_network: Network
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    register(machines, "one", uri, "one")
    s3_network.plan(Rule(RESET, 100, r"PUT .*journal\.jsonl"))
    with pytest.raises(StorageError, match=r"journal\.jsonl"):
        move_champion(Registry(machines.be("one"), uri), "fresco", 1)
    s3_network.plan()
    other = machines.be("two")
    said = settle(Registry(other, uri), "fresco")
    assert len(said) == 1 and said[0].startswith("repaired: the move to version 1")
    assert [line["champion"] for line in read_journal(other)] == [1]
    assert read_json(other.root / "locks" / "aliases-fresco.intent.json") is None


def test_a_lease_and_a_fenced_file_are_one_for_all_machines_however_they_are_named(machines: Machines) -> None:
    one, two = machines.be("one"), machines.be("two")
    with hold_lease(one.root / "retrain" / "lease", "one") as confirm:
        held = read_lease(two.place("retrain", "lease"))
        assert held is not None and held.owner == "one" and read_lease(two.root / "retrain" / "lease") == held
        write_fenced(str(one.root / "retrain" / "state.json"), {"cycle": 1}, confirm().token)
    assert peek_fenced(two.place("retrain", "state.json")) == {"cycle": 1}
    assert peek_fenced(str(two.root / "retrain" / "state.json")) == {"cycle": 1}
    assert not (one.root / "retrain").exists()


def test_a_version_whose_files_are_gone_from_the_bucket_is_named(machines: Machines, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    register(machines, "one", uri, "one")
    whole_folders.remove_whole(machines.be("one").run_dir("one") / "pipeline")
    registry = Registry(machines.be("two"), uri)
    with pytest.raises(RegistryError, match="found nothing there"):
        registry.directory_of(registry.by_number("fresco", 1))
