"""Following the champion: what is written for replicas, what endpoint.json says, and what is told when it cannot be."""

import os
import time
from functools import partial
from typing import Any

import pytest

from cluster.artifacts import open_workspace, read_json
from cluster.champion import set_challenger
from cluster.errors import StorageError
from cluster.metric_files import MetricFiles, metrics_folder
from cluster.registry import CHALLENGER, Registry
from cluster.serve_metrics import ServeMetrics
from cluster.serving import APPLICATION
from flows.config import Config, with_overrides
from flows.follow import ENDPOINT, Follower, read_wanted
from flows.models import resolve_model
from tests.flows.test_serve import set_champion


def status(version: int, error: str = "") -> dict[str, Any]:
    return {"status": "ready", "error": error, "model_version": version}


def test_new_champion_is_written_down_and_recorded_once_the_endpoint_draws_with_it(config: Config, make_run) -> None:
    workspace = open_workspace(config.workspace)
    record = workspace.root / ENDPOINT
    make_run("fresco-aaa", 0)
    make_run("fresco-bbb", 1)
    first = set_champion(config, "fresco-aaa")
    follower = Follower(config, workspace, resolve_model(config, "models:/fresco@champion"))
    follow = follower.follow
    assert follow.every_s == config.serve.follow_s
    assert read_wanted(**follow.arguments) == follower.arguments, "a replica finds what it was started with"
    before = follower.write_record("http://127.0.0.1:9", 42, first)

    second = set_champion(config, "fresco-bbb")
    follower.look(status(first))
    wanted = read_wanted(**follow.arguments) or {}
    assert wanted["model"]["facts"]["model_version"] == second and wanted["model"]["facts"]["run_id"] == "fresco-bbb"
    assert read_json(record) == before, "not before the endpoint says so"
    follower.look(status(second))
    assert read_json(record) == {**before, "model_version": second, "since": read_json(record)["since"]}


def test_record_that_could_not_be_written_is_written_at_the_next_look(config: Config, make_run) -> None:
    make_run("fresco-aaa", 0)
    make_run("fresco-bbb", 1)
    first = set_champion(config, "fresco-aaa")
    record = open_workspace(config.workspace).root / ENDPOINT
    follower = Follower(config, open_workspace(config.workspace), resolve_model(config, "models:/fresco@champion"))
    follower.write_record("http://127.0.0.1:9", 42, first)
    second = set_champion(config, "fresco-bbb")
    record.unlink()
    record.mkdir()  # nothing can take its place
    with pytest.raises(StorageError, match=r"endpoint\.json"):
        follower.look(status(second))
    record.rmdir()
    follower.look(status(second))
    assert read_json(record)["model_version"] == second


def test_record_moves_once_when_the_last_of_several_replicas_draws_with_the_new_version(
    config: Config, make_run, capsys
) -> None:
    """Each look asks any of the replicas, and they load at different moments."""
    config = with_overrides(config, {"serve.max_replicas": 3})
    workspace = open_workspace(config.workspace)
    make_run("fresco-aaa", 0)
    make_run("fresco-bbb", 1)
    first = set_champion(config, "fresco-aaa")
    follower = Follower(config, workspace, resolve_model(config, "models:/fresco@champion"))
    follower.write_record("http://127.0.0.1:9", 42, first)
    second = set_champion(config, "fresco-bbb")
    drawing = {"a": first, "b": first, "killed": first, "starting": None}
    folder = metrics_folder(workspace.root, APPLICATION)

    def numbers(name: str) -> dict[str, Any]:
        version = drawing[name]
        return {"state": "loading"} if version is None else {"state": "ready", "model_version": version}

    files = {name: MetricFiles(folder, ServeMetrics(name, partial(numbers, name))) for name in drawing}

    def look(version: int) -> int:
        for written in files.values():
            written.write()
        long_ago = time.time() - 60
        os.utime(files["killed"].path, (long_ago, long_ago))
        follower.look(status(version))
        return int(read_json(workspace.root / ENDPOINT)["model_version"])

    assert look(first) == first
    drawing["a"] = second
    assert [look(second), look(first), look(second)] == [first] * 3, "whoever answers, one still draws with the old"
    drawing["b"] = second
    assert [look(second), look(second)] == [second] * 2
    assert capsys.readouterr().err.count(f"serves version {second}") == 1


def test_problem_of_one_of_several_replicas_is_told_once(config: Config, make_run, capsys) -> None:
    make_run("fresco-aaa", 0)
    first = set_champion(config, "fresco-aaa")
    follower = Follower(config, open_workspace(config.workspace), resolve_model(config, "models:/fresco@champion"))
    follower.write_record("http://127.0.0.1:9", 42, first)
    for error in ("no room", "", "no room", ""):
        follower.look(status(first, error))
    assert capsys.readouterr().err.count("no room") == 1


def test_champion_that_cannot_be_had_changes_nothing_and_is_told_once(config: Config, make_run, capsys) -> None:
    workspace = open_workspace(config.workspace)
    make_run("fresco-aaa", 0)
    first = set_champion(config, "fresco-aaa")
    follower = Follower(config, workspace, resolve_model(config, "models:/fresco@champion"))
    follower.write_record("http://127.0.0.1:9", 42, first)
    changed = make_run("fresco-bbb", 1)
    set_champion(config, "fresco-bbb")
    weights = changed / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"\0")
    for _ in range(3):
        follower.look(status(first))
    follower.look(status(first, "ValueError: no room"))
    told = capsys.readouterr().err
    assert told.count("the files changed after they were registered") == 1
    assert read_wanted(**follower.follow.arguments) == follower.arguments


def test_challenger_is_written_beside_the_champion_where_it_has_a_share(config: Config, make_run, capsys) -> None:
    workspace, registry = open_workspace(config.workspace), Registry(open_workspace(config.workspace))
    make_run("fresco-aaa", 0)
    changed = make_run("fresco-bbb", 1)
    second = set_champion(config, "fresco-bbb")
    first = set_champion(config, "fresco-aaa")
    tried = with_overrides(config, {"serve.shadow_share": 0.5})
    followers = [Follower(one, workspace, resolve_model(one, "models:/fresco@champion")) for one in (config, tried)]
    for follower in followers:
        follower.write_record("http://127.0.0.1:9", 42, first)
    set_challenger(registry, "fresco", second)

    def challenger(follower: Follower) -> Any:
        follower.look(status(first))
        wanted = read_wanted(**follower.follow.arguments) or {}
        assert wanted["model"]["facts"]["model_version"] == first
        return wanted["challenger"] and wanted["challenger"]["facts"]["model_version"]

    assert challenger(followers[0]) is None, "no share, no challenger"
    assert challenger(followers[1]) == second
    assert capsys.readouterr().err.count(f"the challenger is version {second}") == 1
    set_challenger(registry, "fresco", None)
    assert challenger(followers[1]) is None
    registry.set_alias("fresco", CHALLENGER, first)  # by other tools
    assert challenger(followers[1]) is None, "the champion is tried beside nobody"
    weights = changed / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"\0")
    set_challenger(registry, "fresco", second)
    assert challenger(followers[1]) is None and challenger(followers[1]) is None
    assert capsys.readouterr().err.count("the files changed after they were registered") == 1


def test_swap_that_drains_is_told(config: Config, make_run, capsys) -> None:
    make_run("fresco-aaa", 0)
    first = set_champion(config, "fresco-aaa")
    follower = Follower(config, open_workspace(config.workspace), resolve_model(config, "models:/fresco@champion"))
    follower.write_record("http://127.0.0.1:9", 42, first)
    for _ in range(2):
        follower.look({**status(first), "status": "swapping", "reason": "version 5 needs 9 GiB"})
    assert capsys.readouterr().err.count("version 5 needs 9 GiB") == 1


def test_nothing_written_is_nothing_wanted(tmp_path) -> None:
    assert read_wanted(str(tmp_path / "none.json")) is None
