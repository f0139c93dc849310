"""A workspace on S3 with a tracking server: what one machine began another goes on with, promotes, serves and undoes.

A machine is a stage folder of its own; workers of the shared Ray session know no AWS_* variables but those carried.
"""

import io
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from cluster import s3, stage, storage
from cluster.artifacts import open_workspace, read_journal, read_record
from cluster.errors import StorageError
from cluster.workers import read_lines
from components.errors import InputError
from flows import (
    evaluate,
    generate,
    history,
    monitor,
    prepare,
    promote,
    retrain,
    rollback,
    serve,
    status,
    timeline,
    train,
)
from flows.config import Config, load_config
from tests.faults import LOST_ANSWER, RESET, SLOW_DOWN, TRUNCATE, Network, Rule
from tests.loop_world import arrive, loop_config
from tests.machines import Machines
from tests.servers import free_port, mlflow_server

SECRET, TOKEN = "not-to-be-seen-5f1e0c9a", "nor-this-session-token-77d0b3"
HOOK = "T0-nor-where-the-loop-tells-1a2b"


@pytest.fixture(scope="module")
def mlflow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tracking server keeps database, files and log."""
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture(scope="module")
def tracking_uri(mlflow_folder: Path) -> Iterator[str]:
    port = free_port()
    with mlflow_server(mlflow_folder, f"sqlite:///{mlflow_folder / 'mlflow.db'}", port):
        yield f"http://127.0.0.1:{port}"


def config_of(base: Path, workspace: str, tracking_uri: str, *overrides: str) -> Config:
    return load_config(
        overrides=[
            f"model.base={base}",
            "name=story",
            "data.source=emblems://base?count=60&seed=3",
            "data.resolution_px=16",
            "data.test_fraction=0.2",
            "train.steps=12",
            "train.global_batch=4",
            "train.freezing=denoiser",
            "train.eval_every_steps=6",
            "evaluate.prompts=4",
            "evaluate.sampling_steps=2",
            "evaluate.bootstrap=100",
            "placement.workers=1",
            "placement.engine=torch",
            "placement.checkpoint_every_steps=4",
            f"placement.tracking_uri={tracking_uri}",
            f"retrain.webhook=https://chat.example/hooks/{HOOK}",
            "retrain.webhook_secret_file=hook.key",
            f"retrain.command=tell --token {HOOK}",
            "serve.default_steps=2",
            "serve.follow_s=0.5",
            *overrides,
        ],
        workspace=workspace,
    )


def weights_of(pipeline: Path) -> dict[str, Any]:
    return {str(path.relative_to(pipeline)): load_file(path) for path in sorted(pipeline.rglob("*.safetensors"))}


def test_a_workspace_on_s3_without_a_tracking_server_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^placement\.tracking_uri expected .*mlflow server"):
        load_config(workspace="s3://bucket/prefix")


def test_another_machine_makes_the_next_version_from_what_the_first_one_saw(
    examined_here: None, ray_session: None, machines: Machines, tiny_base: Path
) -> None:
    def made(count: int) -> dict[str, str]:
        source = f"data.source=emblems://base?count={count}&seed=3"
        dataset = prepare.ensure_dataset(config_of(tiny_base, machines.uri, "http://127.0.0.1:9", source))
        rows = pq.read_table(dataset.directory / "manifest.parquet", columns=["sha256", "first_seen"])
        return dict(zip(rows["sha256"].to_pylist(), rows["first_seen"].to_pylist(), strict=True))

    machines.be("one")
    before = made(40)
    time.sleep(1.1)  # times are told by the second
    machines.be("two")
    after = made(50)
    assert before.items() <= after.items() and len(set(after.values())) == 2


@pytest.mark.slow  # training, an endpoint, and a tracking server
def test_verbs_go_on_where_another_machine_stopped(
    s3_network: Network,
    tracking_uri: str,
    mlflow_folder: Path,
    ray_session: None,
    tiny_base: Path,
    machines: Machines,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = config_of(tiny_base, machines.uri, tracking_uri)
    here = config_of(tiny_base, str(tmp_path / "local"), tracking_uri, "name=alone")

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)

    # One machine prepares, trains, and is stopped in the middle of its second checkpoint.
    machines.be("one")
    s3_network.plan(Rule(SLOW_DOWN, 6, chance=0.1), Rule(LOST_ANSWER, 6, "PUT", 0.1), Rule(TRUNCATE, 6, "GET", 0.1))
    prepared = prepare.run(config)
    s3_network.plan(Rule(RESET, 1000, "PUT .*step-00000008/"))
    with pytest.raises(StorageError, match="step-00000008"):
        train.run(config)
    s3_network.plan()
    workspace = machines.be("one")
    run_id = next(path.name for path in stage.folders(workspace.runs))
    assert read_record(workspace.run_dir(run_id)) is None

    # Another goes on from the first checkpoint; the result is that of a run that nothing happened to.
    machines.be("two")
    trained = train.run(config)
    assert trained["run_id"] == run_id and trained["steps"] == 12
    directory = open_workspace(config.workspace).run_dir(run_id)
    log = read_lines(directory / "metrics.jsonl")
    assert [line["resumed"] for line in log if "pids" in line] == [False, True]
    assert [line["step"] for line in log if "eval/loss" in line] == [0, 6, 12]
    alone = train.run(here)
    assert {key: trained[key] for key in trained if key.startswith("eval")} == {
        key: alone[key] for key in alone if key.startswith("eval")
    }
    same, other = weights_of(directory / "pipeline"), weights_of(Path(alone["checkpoint"]))
    assert all(torch.equal(same[file][name], other[file][name]) for file in other for name in other[file])

    # It promotes, and its disk is lost.
    assert evaluate.run(config, run_id)["dataset"] == prepared["dataset"]
    promoted = promote.run(config, run_id)
    assert (promoted["decision"], promoted["champion"]) == ("promote", 1)
    shutil.rmtree(machines.be("two").root)

    # A third knows everything: it finds the run complete, draws, serves, promotes and rolls back.
    machines.be("three")
    again = train.run(config)
    assert again["run_id"] == run_id and again["checkpoint"] == f"{config.workspace}/runs/{run_id}/pipeline"
    known = status.run(config)
    assert known["champion"]["run_id"] == run_id
    assert [line["champion"] for line in history.run(config)["entries"]] == [1]
    wish = generate.Wish(seed=5, steps=2)
    local = generate.run(
        config, ["a red circle"], str(tmp_path / "local-pictures"), wish, model="models:/story@champion"
    )
    served = serve.run(config, detach=True)
    try:
        machines.be("four")
        remote = generate.run(config, ["a red circle"], str(tmp_path / "pictures"), wish)
        assert remote["model_version"] == served["model_version"] == 1
        assert Path(remote["files"][0]).read_bytes() and Path(local["files"][0]).read_bytes()
        machines.be("three")
        second = promote.run(config, str(tiny_base), force=True)
        assert second["champion"] == 2 and second["previous"] == 1
    finally:
        machines.be("three")
        assert serve.run(config, stop=True)["stopped"]
    machines.be("five")
    assert rollback.run(config)["champion"] == 1
    events = [line["event"] for line in read_journal(open_workspace(config.workspace))]
    assert events == ["dataset", "promote", "promote", "rollback"]
    _no_local_paths(config, tmp_path)
    assert leaks(config.workspace, (tmp_path, mlflow_folder), "".join(capfd.readouterr())) == []


@pytest.mark.slow  # two trainings of the loop
def test_the_loop_goes_on_on_another_machine_with_a_source_that_is_a_bucket_too(
    s3_network: Network,
    tracking_uri: str,
    mlflow_folder: Path,
    ray_session: None,
    tiny_base: Path,
    machines: Machines,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    source = machines.uri.replace("/team/", "/arrivals/")
    lenient = ("gate.min_improvement=0", "gate.seed_spread=0", "gate.significance=0.2", "gate.max_clip_drop=100")
    places = (f"data.source={source}", f"placement.tracking_uri={tracking_uri}", "monitor.false_alarms_per_year=100")
    config = loop_config(tmp_path, tiny_base, *lenient, *places).model_copy(update={"workspace": machines.uri})
    arrive(source, "base", 0, 60)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)

    # The first machine makes the first champion.
    machines.be("one")
    assert retrain.run(config, once=True)["decision"] == "promoted"
    shutil.rmtree(machines.be("one").root)

    # Another says that the world drifted, and dies in the middle of a cycle.
    arrive(source, "drifted", 100, 40)
    machines.be("two")
    found = monitor.run(config)
    assert found["tested"] and found["verdict"] == "drift"
    assert found["report"].startswith(f"{machines.uri}/reports/monitor-") and storage.exists(found["report"])
    s3_network.plan(Rule(RESET, 1000, "PUT .*step-00000004/"))
    with pytest.raises(StorageError, match="step-00000004"):
        retrain.run(config, once=True)
    s3_network.plan()
    shutil.rmtree(machines.be("two").root)

    # A third finds the stages that are done, and the timeline and the monitor know all of it.
    workspace = machines.be("three")
    ended = retrain.run(config, once=True)
    assert ended["decision"] in ("promoted", "refused")
    machines.be("four")
    told = timeline.run(config)
    assert (told["cycles"], told["datasets"]) == (2, 2) and storage.exists(f"{machines.uri}/reports/timeline.html")
    stages = [line for line in read_journal(workspace) if line["event"] == "stage" and line["cycle"] == "cycle-0002"]
    states = [(line["stage"], line["state"]) for line in stages]
    assert len(states) == len(set(states)) and ("train", "done") in states
    _no_local_paths(config, tmp_path)
    assert leaks(config.workspace, (tmp_path, mlflow_folder), "".join(capfd.readouterr())) == []


def test_a_secret_is_found_wherever_it_lies(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    table = tmp_path / "packed"
    pq.write_table(pa.table({"note": [f"{TOKEN} " * 50]}), table, compression="zstd")
    packed = table.read_bytes()
    table.unlink()
    for name, content in (("a.html", f"<p>{SECRET}"), ("b/.hidden.png", f"\x89PNG {TOKEN}"), ("c.json", "{}")):
        storage.write_bytes_atomic(f"{bucket}/team/{name}", content.encode())
    storage.write_bytes_atomic(f"{bucket}/arrivals/d.parquet", packed)
    (tmp_path / "mlflow.db").write_bytes(b"SQLite\0" + TOKEN.encode() + b"\0")
    (tmp_path / "plain.log").write_text("nothing")
    print(SECRET)
    found = leaks(f"{bucket}/team", (tmp_path,), "".join(capfd.readouterr()))
    keys = ["arrivals/d.parquet", "team/a.html", "team/b/.hidden.png"]
    assert found == [*keys, str(tmp_path / "mlflow.db"), "what was printed"]


def leaks(workspace: str, folders: Sequence[Path], printed: str) -> list[str]:
    """Name every object of the workspace's bucket and every file of the folders, of any kind, that holds a secret."""
    bucket = workspace.removeprefix("s3://").partition("/")[0]
    pages = s3.client().get_paginator("list_objects_v2").paginate(Bucket=bucket)
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    assert keys, "there is something to look at"
    found = [key for key in keys if _tells(s3.read(bucket, key)[0])]
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    found += [str(path) for path in files if _tells(path.read_bytes())]
    return found + (["what was printed"] if _tells(printed.encode()) else [])


def _tells(content: bytes) -> bool:
    """Whether bytes, or the texts in a packed table, hold a secret."""
    if content.startswith(b"PAR1"):
        table = pq.read_table(io.BytesIO(content))
        texts = [column for column in table.columns if pa.types.is_string(column.type)]
        content += repr([column.to_pylist() for column in texts]).encode()
    return any(secret.encode() in content for secret in (SECRET, TOKEN, HOOK))


def _no_local_paths(config: Config, tmp_path: Path) -> None:
    """Nothing in the workspace names a path that means nothing on another machine, and all its JSON can be read."""
    for entry in storage.list_files(config.workspace):
        if entry.uri.endswith((".json", ".jsonl")):
            text = storage.read_bytes(entry.uri).decode()
            assert str(tmp_path / "machines") not in text, entry.uri
            for line in text.splitlines() if entry.uri.endswith(".jsonl") else [text]:
                json.loads(line)
