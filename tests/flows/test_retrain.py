"""The standing loop: what it decides and says with a real champion and source, real tiny cycles, two loops, kills."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster import lease
from cluster.artifacts import open_workspace, read_journal
from cluster.errors import LeaseLostError, StorageError
from cluster.fencing import write_fenced
from cluster.lease import hold_lease, read_lease
from cluster.registry import CHAMPION, Registry
from components.evidence import Served
from components.triggers import decide
from flows import arrivals, findings, monitor, prepare, promote, reference, retrain, snapshot, stages
from flows.config import Config, load_config, with_overrides
from flows.ledger import Cycle, Ledger, State, asked_uri, lease_place, look_at, state_uri
from tests.loop_world import arrive, crown, loop_config, write_config
from tests.servers import free_port

WAIT_S = 240


@pytest.fixture
def config(tmp_path: Path, tiny_pipelines: dict[int, Path], empty_registry: Path) -> Config:
    """40 emblems in a folder and no champion yet."""
    arrive(tmp_path / "source", "base", 0, 40)
    (tmp_path / "workspace").mkdir()
    (tmp_path / "workspace" / "mlflow.db").write_bytes(empty_registry.read_bytes())
    return loop_config(tmp_path, tiny_pipelines[0])


@pytest.fixture
def served(config: Config, tiny_pipelines: dict[int, Path], examined_here: None) -> Config:
    """The same with a champion made from those pictures."""
    dataset = prepare.ensure_dataset(config)
    crown(config, tiny_pipelines[0], "run-0", dataset.id)
    return config


def journal_of(config: Config, event: str = "") -> list[dict[str, Any]]:
    lines = read_journal(open_workspace(config.workspace))
    return [line for line in lines if not event or line["event"] == event]


def source_of(config: Config) -> Path:
    return Path(config.data.source)


def set_state(config: Config, **values: Any) -> None:
    workspace = open_workspace(config.workspace)
    with hold_lease(lease_place(workspace), "test", wait_s=5) as confirm:
        book = Ledger(workspace, confirm)
        for name, value in values.items():
            assert hasattr(book.state, name)
            setattr(book.state, name, value)
        book.save()


def test_nothing_new_is_a_no_with_its_numbers_in_the_journal(served: Config) -> None:
    result = retrain.run(served, once=True)
    assert (result["decision"], result["champion_before"], result["champion_after"]) == ("wait", 1, 1)
    assert result["trigger"]["reasons"] == ["no trigger: 0 new pictures, 10 are enough"]
    assert result["stages"] == [] and result["dataset"].startswith("loop@")
    (line,) = journal_of(served, "trigger")
    assert (line["decision"], line["numbers"]["new_images"]) == ("wait", {"new": 0, "refused": 0, "least": 10})


def test_pictures_without_captions_and_a_folder_that_shrank_are_told(served: Config) -> None:
    arrive(source_of(served), "drifted", 0, 5)
    for path in source_of(served).glob("drifted-*.txt"):
        path.unlink()
    for path in sorted(source_of(served).glob("base-*"))[:6]:
        path.unlink()
    waits = retrain.run(served, once=True)["trigger"]
    assert waits["reasons"] == [
        "no trigger: 0 new pictures, 10 are enough",
        "5 files wait: no caption",
        "6 files of the champion's data are gone from the source or were replaced; its dataset version keeps them",
    ]
    (line,) = journal_of(served, "trigger")
    assert line["numbers"]["pending"] == {"caption_not_here_yet": 5} and line["numbers"]["missing"] == {"files": 6}


def test_enough_new_pictures_wait_for_the_cool_down_and_the_budget(served: Config) -> None:
    arrive(source_of(served), "drifted", 0, 12)
    set_state(served, ended=time.time() - 60)
    tight = with_overrides(served, {"retrain.cooldown_s": 3600, "retrain.budget_steps_per_week": 5})
    reasons = retrain.run(tight, once=True)["trigger"]["reasons"]
    assert reasons[0].startswith("no, because the last cycle ended 6") and "cool-down is 3600 s" in reasons[0]
    assert reasons[1] == "no, because 0 steps of the last 7 days and 6 to come exceed the budget of 5"
    assert reasons[2] == "asked for: 12 new pictures, 10 are enough"


def test_missed_ticks_are_one_trigger_and_a_tick_without_news_is_over(served: Config) -> None:
    daily = with_overrides(served, {"retrain.schedule": "0 3 * * *", "retrain.time_zone": "Europe/Berlin"})
    set_state(daily, last_tick=time.time() - 7 * 86400)
    result = retrain.run(daily, once=True)
    assert result["trigger"]["kinds"] == ["nothing_new", "schedule"]
    assert "7 ticks taken as one" in result["trigger"]["reasons"][1]
    again = retrain.run(daily, once=True)
    assert again["trigger"]["kinds"] == [] and "the next tick of '0 3 * * *'" in again["trigger"]["reasons"][0]


def test_ticks_from_before_the_loop_are_not_owed(served: Config) -> None:
    daily = with_overrides(served, {"retrain.schedule": "* * * * *"})
    assert "the next tick" in retrain.run(daily, once=True)["trigger"]["reasons"][0]


def test_arrivals_of_a_refused_attempt_are_no_reason_again(served: Config) -> None:
    arrive(source_of(served), "drifted", 0, 12)
    workspace = open_workspace(served.workspace)
    with hold_lease(lease_place(workspace), "test", wait_s=5) as confirm:
        book = Ledger(workspace, confirm)
        found = findings.look(served, book, force=False, patient=False)
        assert found.seen is not None and found.parent is not None and found.evidence.new_images == 12
        snapshot.freeze(workspace, "cycle-0001", found.seen)
        assert snapshot.thaw(workspace, "cycle-0001") == found.seen
        attempt = {"parent": found.parent.id, "new": 12, "run_id": "run-1", "dataset": "loop@2", "reasons": ["worse"]}
        book.refuse({"cycle": "cycle-0001", **attempt})
        book.save()
    result = retrain.run(served, once=True)
    assert result["trigger"]["reasons"] == [
        "no trigger: 0 new pictures (12 more were in a refused attempt), 10 are enough"
    ]
    arrive(source_of(served), "drifted", 50, 9)
    assert "9 new pictures (12 more" in retrain.run(served, once=True)["trigger"]["reasons"][0]


def test_what_a_cycle_froze_stays_also_when_its_loop_was_killed_or_replaced(served: Config) -> None:
    workspace = open_workspace(served.workspace)
    arrive(source_of(served), "drifted", 0, 12)
    with hold_lease(lease_place(workspace), "test", wait_s=5) as confirm:
        book = Ledger(workspace, confirm)
        cycle = Cycle(id="cycle-0001", turn=1, began=0.0, trigger={}, champion_before=1)
        first = stages.take_snapshot(stages.Desk(served, book, cycle))
        arrive(source_of(served), "drifted", 50, 9)
        again = stages.take_snapshot(stages.Desk(served, book, cycle))  # killed before it saved, the loop comes again
    assert again == first and first["new"] == 12
    frozen = snapshot.thaw(workspace, "cycle-0001")
    assert snapshot.freeze(workspace, "cycle-0001", replace(frozen, new=())) == frozen, "as a late holder would"
    assert snapshot.thaw(workspace, "cycle-0001") == frozen and len(frozen.new) == 12


def test_champion_whose_data_is_gone_and_a_source_that_went_away_are_told_and_nothing_is_lost(served: Config) -> None:
    arrive(source_of(served), "drifted", 0, 12)
    source_of(served).rename(source_of(served).with_name("elsewhere"))
    forced = retrain.run(served, once=True, force=True)["trigger"]
    assert forced["kinds"] == ["manual", "source"] and "found nothing there; check the path" in forced["reasons"][0]
    source_of(served).with_name("elsewhere").rename(source_of(served))
    (data,) = (Path(served.workspace) / "data").iterdir()
    data.rename(data.with_name("moved"))
    forced = retrain.run(served, once=True, force=True)["trigger"]
    assert "found it gone; bring that folder back" in forced["reasons"][0]
    data.with_name("moved").rename(data)
    assert findings_of(served).new_images == 12


def test_a_reference_that_is_damaged_keeps_drift_from_being_told_and_no_other_trigger_from_speaking(
    served: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrive(source_of(served), "drifted", 0, 30)
    watchful = with_overrides(
        served, {"retrain.on_drift": True, "retrain.min_new_images": 30, "monitor.false_alarms_per_year": 100}
    )
    pinned = reference.pin(watchful, 1)
    (items,) = pinned.directory.glob("items-*")
    content = bytearray(items.read_bytes())
    content[len(content) // 2] ^= 1
    items.write_bytes(bytes(content))
    evidence = findings_of(watchful)
    decision = decide(evidence, watchful.retrain)
    assert [reason.kind for reason in decision.triggers] == ["new_images"], decision
    told = next(reason.text for reason in decision.quiet if reason.kind == "drift")
    assert f"{items} expected to be as it was pinned for version 1" in told and "pin the reference anew" in told
    items.unlink()
    assert "found nothing" in findings_of(watchful).drift.reasons[0]


def test_a_storage_that_does_not_answer_the_monitor_is_away_for_the_loop_too(
    served: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*given: Any, **named: Any) -> Any:
        raise StorageError("s3://bucket expected to be read, found: nothing answers there")

    arrive(source_of(served), "drifted", 0, 12)
    monkeypatch.setattr(monitor, "run", away)
    with pytest.raises(StorageError, match="nothing answers"):
        retrain.run(with_overrides(served, {"retrain.on_drift": True}), once=True)


@pytest.mark.parametrize("whose", ["monitor", "loop"])
def test_a_lease_that_is_lost_while_the_monitor_looks_ends_the_loop_only_where_it_is_the_loops(
    served: Config, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    workspace = open_workspace(served.workspace)
    lost = lease_place(workspace) if whose == "loop" else workspace.place("monitor", "looks", served.name, "lease")
    real = monitor.pin

    def overtaken(*given: Any) -> Any:
        holder = read_lease(lost)
        assert holder is not None and lease._claim(f"{lost}.epochs", "heir", 30.0, holder.token + 1)
        if whose == "loop":
            raise LeaseLostError("what the monitor, held up as long, may find of its own lease")
        return real(*given)

    arrive(source_of(served), "drifted", 0, 4)
    monkeypatch.setattr(monitor, "pin", overtaken)
    calm = with_overrides(served, {"retrain.on_drift": True, "retrain.lease_ttl_s": 600})  # its guard does not look now
    if whose == "loop":
        with pytest.raises(LeaseLostError, match=r"retrain/lease\.epochs expected to be held by fresco retrain"):
            retrain.run(calm, once=True)
        assert not journal_of(calm, "trigger")
    else:
        (reason,) = retrain.run(calm, once=True)["trigger"]["reasons"]
        assert "the monitor says not_enough_data" in reason and "monitor/looks/loop/lease.epochs" in reason


def findings_of(config: Config) -> Any:
    workspace = open_workspace(config.workspace)
    with hold_lease(lease_place(workspace), "test", wait_s=5) as confirm:
        return findings.look(config, Ledger(workspace, confirm), force=False, patient=False).evidence


def test_files_that_arrived_just_now_are_waited_for_once(served: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    arrive(source_of(served), "drifted", 0, 4)
    slept: list[float] = []
    monkeypatch.setattr(findings.time, "sleep", slept.append)
    looks = iter([1000.0, 2000.0])
    real = arrivals.look
    monkeypatch.setattr(arrivals, "look", lambda *given, **named: real(*given, **named, at=next(looks)))
    patient = with_overrides(served, {"monitor.settle_s": 60})
    assert "4 new pictures" in retrain.run(patient, once=True)["trigger"]["reasons"][0]
    assert slept == [60]


def test_a_clock_that_was_set_back_is_taken_as_it_is(served: Config) -> None:
    arrive(source_of(served), "drifted", 0, 12)
    ahead = time.time() + 3600
    spent = [{"cycle": "c", "what": "train", "at": ahead, "steps": 6, "gpu_hours": 0.0}]
    set_state(served, ended=ahead, last_tick=ahead, spent=spent)
    limited = with_overrides(served, {"retrain.cooldown_s": 1, "retrain.schedule": "* * * * *"})
    first = retrain.run(limited, once=True)["trigger"]
    assert first["kinds"] == ["cooldown", "new_images"], "from now on the cool-down passes"
    state = look_at(open_workspace(served.workspace))
    assert state.ended is not None and state.ended <= time.time() and state.spent[0]["at"] <= time.time()


def test_a_search_that_is_due_counts_in_the_budget(tmp_path: Path) -> None:
    settings = ("search.trials=5", "retrain.steps=4", "retrain.search_every=3", "retrain.anchor_every=4")
    config = loop_config(tmp_path, tmp_path, *settings)

    def planned(turns: int, searched: int, first: bool = False, **more: Any) -> tuple[int, float]:
        spent = [{"cycle": "c", "what": "train", "at": 0.0, "steps": 8, "gpu_hours": 2.0}]
        state = State(turns=turns, searched=searched, spent=spent)
        found = findings.budget(with_overrides(config, more), state, first)
        return found["planned_steps"], found["planned_gpu_hours"]

    assert planned(0, 0, first=True) == (6 + 5 * 6, 9.0), "the first cycle searches, at train.steps"
    assert planned(2, 1) == (4, 1.0) and planned(4, 1) == (4 + 5 * 4, 6.0)
    assert planned(3, 1) == (6 + 5 * 6, 9.0), "an anchor trains, and its search tries, train.steps"
    assert planned(4, 1, **{"search.budget_steps": 7}) == (4 + 7 + 4, 3.75), "the best one is finished all the same"
    assert planned(4, 1, **{"retrain.search_every": 0}) == (4, 1.0)


def test_receivers_are_told_how_it_was_decided_and_how_a_cycle_ended_and_nothing_else(tmp_path: Path) -> None:
    got: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    key = tmp_path / "hook.key"
    key.write_text("a key of the tests, long enough")
    key.chmod(0o600)
    events = ["trigger", "dataset", "stage", "monitor", "promote", "cycle", "retrain", "rollback", "trigger"]
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        receiver = [f"retrain.webhook=http://127.0.0.1:{server.server_port}", f"retrain.webhook_secret_file={key}"]
        tell = retrain._teller(load_config(overrides=receiver, workspace=str(tmp_path / "somewhere")))
        for number, event in enumerate(events):
            tell({"event": event, "decision": "wait", "reasons": [f"line {number}"]})
        server.shutdown()
        thread.join()
    assert [(one["event"], one["reasons"]) for one in got] == [
        ("trigger", ["line 0"]),
        ("cycle", ["line 5"]),
        ("trigger", ["line 8"]),
    ]
    assert {one["workspace"] for one in got} == {"somewhere"}


def test_the_standing_loop_tells_the_same_wait_once(served: Config) -> None:
    def interrupt(*_: Any) -> None:
        looks.append(1)
        if len(looks) == 3:
            raise KeyboardInterrupt

    looks: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrain, "_sleep", interrupt)
        result = retrain.run(served)
    assert len(looks) == 3 and result["decision"] == "wait"
    assert len(journal_of(served, "trigger")) == 1
    assert read_lease(lease_place(open_workspace(served.workspace))) is None, "and gives the lease back"


def test_a_tracking_server_that_is_away_for_a_look_is_waited_for(
    served: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    looks, looked, slept = [f"http://127.0.0.1:{free_port()}", ""], findings.look, []

    def look(config: Config, *given: Any, **named: Any) -> Any:
        Registry(open_workspace(config.workspace), looks.pop(0)).by_alias(config.name, CHAMPION)
        return looked(config, *given, **named)

    def sleep(*_: Any) -> None:
        slept.append(1)
        if not looks:
            raise KeyboardInterrupt

    monkeypatch.setattr(findings, "look", look)
    monkeypatch.setattr(retrain, "_sleep", sleep)
    assert retrain.run(served)["trigger"]["reasons"] == ["no trigger: 0 new pictures, 10 are enough"]
    assert len(slept) == 2
    assert "found: nothing answers there; check" in (told := capsys.readouterr().err) and "the loop goes on in" in told


@pytest.mark.parametrize("where", ["before the cycle", "in the cycle", "at its end"])
def test_force_waits_for_storage_that_is_away_and_becomes_one_cycle(
    served: Config, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    did: list[str] = []

    def away(now: str) -> None:
        if now == where and f"away {now}" not in did:
            did.append(f"away {now}")
            raise StorageError("nothing answers")

    def look(*given: Any, **named: Any) -> Any:
        away("before the cycle")
        return looked(*given, **named)

    def finish(config: Config, book: Ledger) -> dict[str, Any]:
        assert book.state.cycle is not None
        away("in the cycle")
        line = {"cycle": book.state.cycle.id, "decision": "refused", "reasons": ["x"], "trigger": {}, "stages": []}
        did.append(book.state.cycle.id)
        book.state.cycle = None
        book.save()
        away("at its end")
        return line

    def sleep(*_: Any) -> None:
        did.append("slept")
        assert len(did) < 9
        if did.count("slept") == 2:
            raise KeyboardInterrupt

    looked = findings.look
    monkeypatch.setattr(findings, "look", look)
    monkeypatch.setattr(retrain.cycle, "run", finish)
    monkeypatch.setattr(retrain, "_sleep", sleep)
    retrain.run(served, force=True)
    ended = ["cycle-0001", f"away {where}", "slept", "slept"]
    assert did == (ended if where == "at its end" else [f"away {where}", "slept", "cycle-0001", "slept"])


@pytest.fixture
def busy(served: Config, monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    """Another loop holds the lease."""
    monkeypatch.setattr(retrain, "ONCE_WAIT_S", 0.2)
    with hold_lease(lease_place(open_workspace(served.workspace)), retrain.OWNER, wait_s=5):
        yield served


def test_a_second_loop_with_once_leaves_with_a_clear_word_and_touches_nothing(busy: Config) -> None:
    before = journal_of(busy)
    result = retrain.run(busy, once=True)
    assert result["decision"] == "wait" and result["trigger"]["kinds"] == ["busy"]
    assert "another loop works here: fresco retrain (process" in result["trigger"]["reasons"][0]
    assert journal_of(busy) == before and not Path(state_uri(open_workspace(busy.workspace))).exists()


def test_force_beside_a_working_loop_hands_it_the_request_once(busy: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    retrain.run(busy, once=True, force=True)
    assert json.loads(Path(asked_uri(open_workspace(busy.workspace))).read_text())["request"]


def test_request_by_hand_becomes_one_cycle(served: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[dict[str, Any]] = []

    def finish(config: Config, book: Ledger) -> dict[str, Any]:
        assert book.state.cycle is not None
        begun.append(book.state.cycle.trigger)
        line = {"cycle": book.state.cycle.id, "decision": "refused", "reasons": ["x"], "trigger": {}, "stages": []}
        book.state.cycle = None
        book.save()
        return line

    monkeypatch.setattr(retrain.cycle, "run", finish)
    retrain._ask(open_workspace(served.workspace))
    assert retrain.run(served, once=True)["decision"] == "refused"
    assert [reason["kinds"] for reason in begun] == [["manual"]] and "request" in begun[0]["reasons"][0]
    assert retrain.run(served, once=True)["decision"] == "wait" and len(begun) == 1


def test_a_loop_that_was_replaced_while_it_slept_stops_and_changes_nothing(served: Config) -> None:
    workspace = open_workspace(served.workspace)
    set_state(served, cycles=3)
    with hold_lease(lease_place(workspace), "late", wait_s=5) as confirm:
        book = Ledger(workspace, confirm)
        write_fenced(state_uri(workspace), {"cycles": 4}, confirm().token + 1)
        with pytest.raises(LeaseLostError, match="another process took the lease over"):
            book.save()
    assert look_at(workspace).cycles == 4


# ------------------------------------------------------------------------------------------- real tiny cycles


def answer(config: Config, model: Any) -> Served:
    """Stands for the rehearsal on the serving path, which has its own tests."""
    return Served(ready_s=1.0, answer_s=0.1, pictures=3, memory_bytes=2**20)


def test_first_start_makes_a_champion_and_arrivals_make_the_next_try(
    config: Config, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promote, "rehearse", answer)
    first = retrain.run(config, once=True)
    assert first["trigger"]["kinds"] == ["first_start"]
    assert (first["decision"], first["champion_before"], first["champion_after"]) == ("promoted", None, 1)
    assert [stage["stage"] for stage in first["stages"]][:3] == ["snapshot", "prepare", "search"]
    arrive(source_of(config), "drifted", 0, 20)
    second = retrain.run(config, once=True)
    assert second["trigger"]["kinds"] == ["new_images"] and second["champion_before"] == 1
    assert second["decision"] in ("promoted", "refused"), second["reasons"]
    card = json.loads((Path(config.workspace) / "data" / second["dataset"] / "card.json").read_text())
    assert card["parent"] == first["dataset"] and card["images"] == 60
    train = next(stage for stage in second["stages"] if stage["stage"] == "train")
    assert train["replay_fraction"] == config.retrain.replay_fraction and train["steps"] == 6
    if second["decision"] == "refused":
        third = retrain.run(config, once=True, force=True)
        assert third["decision"] == "refused" and "were refused in cycle-0002" in third["reasons"][0]
        assert [stage["stage"] for stage in third["stages"]][-1] == "train", "nothing was trained or judged again"
    told = Counter(
        (line["cycle"], line["stage"], line["state"]) for line in journal_of(config) if line["event"] == "stage"
    )
    assert set(told.values()) == {1}


def start(config: Config, folder: Path, *options: str) -> "subprocess.Popen[bytes]":
    """Start the command itself, in a session of its own."""
    command = [sys.executable, "-m", "flows", "retrain", "--config", str(write_config(folder, config)), *options]
    environment = {**os.environ, "PYTHONPATH": str(Path(retrain.__file__).parents[1])}
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, start_new_session=True)


def wait_for(condition: Callable[[], Any], process: "subprocess.Popen[bytes] | None" = None) -> None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if condition():
            return
        assert process is None or process.poll() is None, "the process ended before that"
        threading.Event().wait(0.05)
    raise AssertionError(f"nothing happened within {WAIT_S} s")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_each_stage_the_same_command_goes_on_and_repeats_no_finished_stage(
    config: Config, tmp_path: Path
) -> None:
    for stage in ("prepare", "train", "gate"):

        def began(stage: str = stage) -> bool:
            return any(line.get("stage") == stage and line["state"] == "began" for line in journal_of(config, "stage"))

        process = start(config, tmp_path, "--once", "--json")
        wait_for(began, process)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    process = start(config, tmp_path, "--once", "--json")
    output, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, (tmp_path / "log").read_text()[-3000:]
    result = json.loads(output)
    assert (result["decision"], result["champion_after"], result["cycle"]) == ("promoted", 1, "cycle-0001")
    lines = Counter((line["stage"], line["state"]) for line in journal_of(config, "stage"))
    assert set(lines.values()) == {1} and len(lines) == 2 * 8
    assert [line["decision"] for line in journal_of(config, "cycle")] == ["promoted"]
    assert len(journal_of(config, "promote")) == 1
    assert Registry(open_workspace(config.workspace)).by_alias(config.name, CHAMPION) is not None


@pytest.mark.slow
def test_a_stopped_loop_is_replaced_after_its_time_to_live_and_ends_when_it_wakes(
    served: Config, tmp_path: Path
) -> None:
    workspace = open_workspace(served.workspace)
    process = start(served, tmp_path)
    try:
        wait_for(lambda: journal_of(served, "trigger"), process)
        os.kill(process.pid, signal.SIGSTOP)
        with hold_lease(lease_place(workspace), retrain.OWNER, wait_s=60) as confirm:
            heir = Ledger(workspace, confirm)
            heir.state.cycles = 41
            heir.save()
            os.kill(process.pid, signal.SIGCONT)
            process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 1
    assert "the lease was taken over" in (tmp_path / "log").read_text()
    assert look_at(workspace).cycles == 41
