"""The search between Tune and the runs, with a thread that pretends to train: what is recorded, told and continued."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster import telemetry
from cluster.artifacts import open_workspace, read_json
from cluster.crew import Crew
from cluster.errors import TrackingError
from cluster.exchange import ENDED, OVER, Exchange
from cluster.proposals import COMPLETE, FAILED, STOPPED
from cluster.trials import run_trials
from cluster.workers import named
from components.dataset import DatasetVersion
from components.errors import NonFiniteError
from flows import search
from flows.config import Config, load_config
from flows.encode import EncodedPaths
from flows.job import Job
from flows.search import Search
from flows.search_record import UNFINISHED
from flows.train import Inputs
from flows.tune import check_space, search_fingerprint
from tests.servers import free_port, mlflow_server

RATE = "train.learning_rate.denoiser"


class Pretended:
    """A crew of one group that computes a loss from the rate instead of training; it can be told to die."""

    def __init__(self, placement: Any) -> None:
        import ray

        self.crew = Crew(placement, 1, Path("/nowhere"), 0)
        self.exchange = self.crew.exchange = ray.remote(Exchange).options(num_cpus=0, max_concurrency=100).remote()
        self.steps: list[tuple[str, int]] = []
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        import ray

        while (task := ray.get(self.exchange.take.remote(0))) != ENDED:
            if task is not None:
                self._train(task.job)

    def _train(self, job: Job) -> None:
        import ray

        train = job.config.train
        rate = train.learning_rate.denoiser
        if rate > 1:
            ray.get(self.exchange.failed.remote(0, named(NonFiniteError("expected a finite loss, found nan"))))
            return
        log = telemetry.RunLog(job.directory, job.mlflow_uri, job.mlflow_run_id, 0)
        for step in range(0, train.steps + 1, train.eval_every_steps):
            loss = 1 / (1 + rate * 1000 * step)
            self.steps.append((job.directory.name, step))
            report = {"step": float(step), telemetry.EVAL_LOSS: loss, OVER: float(step == train.steps)}
            go_on = ray.get(self.exchange.report.remote(0, report))
            log.write({"step": step, telemetry.EVAL_LOSS: loss})
            log.flush()
            if not go_on:
                break
        ray.get(self.exchange.done.remote(0))

    def close(self) -> None:
        import ray

        ray.get(self.exchange.close.remote())
        self.thread.join(60)
        ray.kill(self.exchange)


@pytest.fixture
def config(config: Config) -> Config:
    """Seven trials of 12 steps over rates, one of which cannot be trained."""
    return load_config(
        overrides=[
            "name=tiny",
            "train.steps=12",
            "train.eval_every_steps=4",
            "search.trials=7",
            "search.sampler=random",
            "search.grace_steps=4",
            "search.reduction_factor=2",
            f"search.space={{{RATE}: {{choice: [0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 9.0]}}}}",
        ],
        workspace=config.workspace,
    )


@pytest.fixture(autouse=True)
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Which encodings were asked for; nothing is read by whoever pretends."""
    asked: list[bool] = []

    def none(config: Config, dataset: DatasetVersion, base: Path, with_text: bool) -> EncodedPaths:
        asked.append(with_text)
        return EncodedPaths({}, {}, Path())

    monkeypatch.setattr(search, "ensure_encoded", none)
    return asked


@pytest.fixture
def inputs(config: Config, tiny_base: Path) -> Inputs:
    workspace = open_workspace(config.workspace)
    dataset = DatasetVersion("tiny", "0123456789ab", workspace.data / "tiny@0123456789ab", ())
    return Inputs(workspace, dataset, tiny_base, "base0")


@pytest.fixture
def crew(ray_session: None, config: Config) -> Iterator[Pretended]:
    made = Pretended(config.placement)
    yield made
    made.close()


def search_of(config: Config, inputs: Inputs, crew: Pretended) -> Search:
    directory = inputs.workspace.searches / search_fingerprint(config, inputs)
    search = Search(config, check_space(config), inputs, directory)
    search.crew = crew.crew
    return search


def go(search: Search, directory: Path) -> None:
    run_trials(search.rules(1), search, search.crew.exchange, directory)
    if search.error is not None:
        raise search.error


@pytest.mark.slow
def test_search_records_continues_and_repeats_nothing(
    config: Config, inputs: Inputs, crew: Pretended, tmp_path: Path
) -> None:
    limited = config.model_copy(update={"search": config.search.model_copy(update={"budget_steps": 24})})
    first = search_of(limited, inputs, crew)
    go(first, tmp_path / "tune")
    assert 24 <= first.record.total_steps <= 28
    known = len(first.record.trials)
    assert known < 7 and first.record.trials[-1].state in (UNFINISHED, COMPLETE, STOPPED, FAILED)
    ended = [replace(trial) for trial in first.record.trials if trial.ended]
    before = list(crew.steps)

    second = search_of(config, inputs, crew)
    assert second.directory == first.directory and second.record.continued
    go(second, tmp_path / "tune")
    trials = second.record.trials
    assert len(trials) == 7 and {trial.overrides[RATE] for trial in trials} == {
        0.001,
        0.002,
        0.004,
        0.008,
        0.016,
        0.032,
        9.0,
    }
    assert trials[: len(ended)] == ended, "what had ended is as it was"
    computed_again = {run_id for run_id, _ in crew.steps[len(before) :]}
    assert not computed_again & {trial.run_id for trial in ended}
    failed = [trial for trial in trials if trial.state == FAILED]
    assert [trial.overrides[RATE] for trial in failed] == [9.0] and "NonFiniteError" in failed[0].reason
    assert {trial.state for trial in trials} >= {COMPLETE, FAILED}
    best = second.record.best()
    assert best is not None and best.overrides[RATE] == 0.032 and best.steps == 12


def test_every_trial_is_a_child_run_with_its_state(
    config: Config, inputs: Inputs, crew: Pretended, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    search = search_of(config, inputs, crew)
    go(search, tmp_path / "tune")
    client = MlflowClient(inputs.workspace.mlflow_uri)
    for trial in search.record.trials:
        known = read_json(inputs.workspace.run_dir(trial.run_id) / "mlflow.json")
        run = client.get_run(known["run_id"])
        assert run.data.tags[telemetry.PARENT_TAG] == search.parent
        assert run.data.tags["fresco.state"] == trial.state
        assert run.info.status == ("FAILED" if trial.state == FAILED else "FINISHED")
        assert float(run.data.params[RATE]) == trial.overrides[RATE]
        points = client.get_metric_history(known["run_id"], telemetry.EVAL_LOSS)
        assert [point.step for point in points] == (
            [] if trial.state == FAILED else [step for step, _ in trial.reports]
        )


def test_first_trial_is_the_configs_own_recipe(config: Config, inputs: Inputs, crew: Pretended, tmp_path: Path) -> None:
    search = search_of(config, inputs, crew)
    go(search, tmp_path / "tune")
    own = search.record.own()
    assert own is search.record.trials[0] and own.overrides == {RATE: config.train.learning_rate.denoiser}
    assert own.run_id == inputs.run_id(config), "what `fresco train` with the same config makes"
    assert [trial.origin for trial in search.record.trials[1:]] == ["random"] * 6


@pytest.mark.parametrize("change", [{"own_recipe": False}, {"space": {RATE: {"choice": [0.5, 0.6]}}}])
def test_own_recipe_is_left_out_when_unwanted_or_outside_the_space(
    config: Config, inputs: Inputs, crew: Pretended, change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    changed = config.model_copy(update={"search": config.search.model_copy(update=change)})
    assert search_of(changed, inputs, crew).own == {}
    assert ("does not hold the config's own value 0.002" in capsys.readouterr().err) == ("space" in change)


@pytest.mark.parametrize(
    ("plans", "needed"), [(["all"], [False]), (["all", "lora:8"], [False, True]), (["denoiser"], [False, True])]
)
def test_encodings_of_every_plan_are_made_before_worker_groups_take_the_cpus(
    config: Config, inputs: Inputs, crew: Pretended, encoded: list[bool], plans: list[str], needed: list[bool]
) -> None:
    assert config.train.freezing == "all"
    space = {RATE: {"choice": [0.001]}, "train.freezing": {"choice": plans}}
    search_of(config.model_copy(update={"search": config.search.model_copy(update={"space": space})}), inputs, crew)
    assert encoded == needed


def test_space_that_is_used_up_ends_the_search(config: Config, inputs: Inputs, crew: Pretended, tmp_path: Path) -> None:
    larger = config.model_copy(update={"search": config.search.model_copy(update={"trials": 20})})
    search = search_of(larger, inputs, crew)
    go(search, tmp_path / "tune")
    assert len(search.record.trials) == 7


def test_tracking_server_that_was_never_there_is_told_at_once(config: Config, inputs: Inputs, crew: Pretended) -> None:
    placement = config.placement.model_copy(update={"tracking_uri": f"http://127.0.0.1:{free_port()}"})
    with pytest.raises(TrackingError, match=r"tracking server at .*, found: nothing answers there; start it"):
        search_of(config.model_copy(update={"placement": placement}), inputs, crew)


@pytest.mark.slow  # a real tracking server, killed and started again
def test_tracking_server_killed_in_mid_search_loses_and_doubles_nothing(
    config: Config, inputs: Inputs, crew: Pretended, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    port, store = free_port(), f"sqlite:///{tmp_path / 'mlflow.db'}"
    uri = f"http://127.0.0.1:{port}"
    placement = config.placement.model_copy(update={"tracking_uri": uri})
    config = config.model_copy(update={"placement": placement})
    with ExitStack() as servers:
        process = servers.enter_context(mlflow_server(tmp_path, store, port))
        search = search_of(config, inputs, crew)
        reported, away = search.reported, threading.Event()

        def kill_at_the_fourth(number: int, report: dict[str, Any]) -> None:
            reported(number, report)
            if search.record.total_steps > 16 and not away.is_set():
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(30)
                away.set()

        search.reported = kill_at_the_fourth  # type: ignore[method-assign]
        back = threading.Thread(
            target=lambda: away.wait(120) and servers.enter_context(mlflow_server(tmp_path, store, port)), daemon=True
        )
        back.start()
        go(search, tmp_path / "tune")
        back.join(120)
        assert away.is_set() and len(search.record.trials) == 7
        for trial in search.record.trials:
            assert search.track(trial), "the server is back"
        client = MlflowClient(uri)
        runs = client.search_runs([client.get_experiment_by_name(config.name).experiment_id])
        children = [run for run in runs if telemetry.PARENT_TAG in run.data.tags]
        assert len(runs) == len(children) + 1, "one parent"
        assert sorted(run.info.run_name for run in children) == sorted(t.run_id for t in search.record.trials)
        by_name = {run.info.run_name: run for run in children}
        for trial in search.record.trials:
            run = by_name[trial.run_id]
            assert run.data.tags["fresco.state"] == trial.state
            points = client.get_metric_history(run.info.run_id, telemetry.EVAL_LOSS)
            told = [] if trial.state == FAILED else [step for step, _ in trial.reports]
            assert sorted(point.step for point in points) == told
