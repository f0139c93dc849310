"""status: what it says about an empty workspace, a champion, a held lock, and a server that died."""

import os
from dataclasses import asdict, replace
from pathlib import Path

from cluster.artifacts import append_journal, open_workspace, write_json_atomic
from cluster.champion import move_champion
from cluster.fencing import write_fenced
from cluster.lease import hold_lease
from cluster.registry import TAG_DATASET, TAG_MODEL_FINGERPRINT, TAG_RUN, Registry
from flows import status
from flows.config import Config
from flows.serve import server_of


def champion_of(config: Config, *run_ids: str) -> None:
    workspace = open_workspace(config.workspace)
    registry = Registry(workspace)
    for run_id in run_ids:
        directory = workspace.run_dir(run_id) / "pipeline"
        directory.mkdir(parents=True)
        tags = {TAG_RUN: run_id, TAG_DATASET: f"data of {run_id}", TAG_MODEL_FINGERPRINT: run_id}
        move_champion(registry, "fresco", registry.register("fresco", directory, tags).number)


def test_workspace_without_anything_has_nothing_and_is_left_alone(tmp_path: Path) -> None:
    found = status.run(Config(workspace=str(tmp_path)))
    assert found == {
        "champion": None,
        "previous": None,
        "challenger": None,
        "judging": [],
        "lease": None,
        "endpoint": None,
        "loop": None,
        "decisions": [],
    }
    assert list(tmp_path.iterdir()) == []


def test_champion_and_previous_are_told_with_their_making(config: Config, capsys) -> None:
    champion_of(config, "a", "b")
    found = status.run(config)
    since = found["champion"].pop("since")
    evidence = found["champion"].pop("evidence")
    assert (evidence["event"], evidence["since"]) == ("promote", since)
    assert found["champion"] == {"version": 2, "dataset": "data of b", "run_id": "b"}
    assert since.endswith("Z") and len(since) == 20
    assert found["previous"]["version"] == 1 and found["previous"]["run_id"] == "a"
    told = capsys.readouterr()
    assert "champion   version 2" in told.err and "next: fresco serve --detach" in told.err and told.out == ""


def test_last_ten_decisions_are_told_newest_last(config: Config) -> None:
    workspace = open_workspace(config.workspace)
    for number in range(12):
        append_journal(workspace, "promote", champion=number)
    assert [line["champion"] for line in status.run(config)["decisions"]] == list(range(2, 12))


def test_holder_of_the_alias_lock_is_told(config: Config) -> None:
    registry = Registry(open_workspace(config.workspace))
    with hold_lease(registry.lock_path("fresco"), "promote of fresco-1"):
        lease = status.run(config)["lease"]
    assert lease["owner"] == "promote of fresco-1" and lease["pid"] == os.getpid() and lease["held_s"] >= 0
    assert status.run(config)["lease"] is None


def test_endpoint_counts_only_while_its_process_lives(config: Config) -> None:
    workspace = open_workspace(config.workspace)
    lock, record = workspace.root / "locks" / "endpoint.lock", workspace.root / "endpoint.json"
    write_json_atomic(record, {"url": "http://127.0.0.1:9", "pid": os.getpid(), "model_version": 1, "since": "then"})
    assert status.run(config)["endpoint"] is None
    with hold_lease(lock, "fresco serve") as confirm:
        lease = confirm()
        endpoint = status.run(config)["endpoint"]
    assert endpoint["url"] == "http://127.0.0.1:9" and endpoint["status"] == "not answering"
    epoch = workspace.root / "locks" / "endpoint.lock.epochs" / f"{lease.token:012}.json"
    write_json_atomic(epoch, asdict(lease))
    assert server_of(workspace) is not None, "not released"
    assert lease.pid_ticks is not None
    write_json_atomic(epoch, asdict(replace(lease, pid_ticks=lease.pid_ticks + 1)))
    assert server_of(workspace) is None, "its number is another process's"
    assert status.run(config)["endpoint"] is None


def test_loop_is_told_with_its_cycle_its_stage_and_its_last_words(config: Config, capsys) -> None:
    workspace = open_workspace(config.workspace)
    folder = workspace.root / "retrain"
    append_journal(workspace, "monitor", verdict="drift", reasons=["images: 31 % of the arrivals differ"], streams={})
    append_journal(workspace, "trigger", decision="wait", reasons=["no, because the budget is spent"])
    found = status.run(config)["loop"]
    assert (found["lease"], found["cycle"]) == (None, None) and found["monitor"]["verdict"] == "drift"
    with hold_lease(folder / "lease", "fresco retrain") as confirm:
        stages = {"snapshot": {"seconds": 1.0}}
        cycle = {"id": "cycle-0003", "turn": 3, "began": 1_800_000_000.0, "trigger": {}, "stages": stages}
        write_fenced(str(folder / "state.json"), {"cycles": 3, "cycle": cycle}, confirm().token)
        append_journal(workspace, "stage", cycle="cycle-0003", stage="snapshot", state="done")
        append_journal(workspace, "stage", cycle="cycle-0003", stage="train", state="began")
        loop = status.run(config)["loop"]
    assert loop["lease"]["owner"] == "fresco retrain" and loop["lease"]["pid"] == os.getpid()
    assert loop["cycle"] == {
        "id": "cycle-0003",
        "began": "2027-01-15T08:00:00Z",
        "stage": "train",
        "done": ["snapshot"],
    }
    assert (loop["trigger"]["decision"], loop["trigger"]["reasons"]) == ("wait", ["no, because the budget is spent"])
    told = capsys.readouterr().err
    assert "loop       held by fresco retrain" in told and "cycle-0003 at train" in told
    assert "trigger    wait at " in told and "monitor    drift at " in told
    assert "the same command continues it" not in told
    status.run(config)
    assert "cycle-0003 at train, began 2027-01-15T08:00:00Z; the same command continues it" in capsys.readouterr().err


def test_state_that_cannot_be_read_is_told_and_hides_nothing_else(config: Config) -> None:
    workspace = open_workspace(config.workspace)
    state = workspace.root / "retrain" / "state.json"
    state.parent.mkdir()
    state.write_text("{half")
    append_journal(workspace, "cycle", id="cycle-0001", decision="promoted", champion_after=2)
    loop = status.run(config)["loop"]
    assert "expected to be" in loop["problem"] and loop["last_cycle"]["decision"] == "promoted"
