"""serve: refusals before anything starts, and one detached server from start to clean end."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from cluster import s3, storage
from cluster.artifacts import open_workspace, write_record
from cluster.champion import move_champion
from cluster.errors import EndpointError, PlacementError, RegistryError
from cluster.lease import hold_lease, process_is, read_lease
from cluster.registry import TAG_MODEL_FINGERPRINT, Registry
from cluster.serving import readiness
from cluster.whole_folders import keep_whole
from flows import generate, serve, status, verify
from flows.config import Config, with_overrides
from flows.generate import Wish
from flows.models import resolve_model
from tests.faults import RESET, Network, Rule
from tests.machines import Machines


def set_champion(config: Config, run_id: str) -> int:
    registry = Registry(open_workspace(config.workspace))
    found = resolve_model(config, run_id)
    tags = {**found.lineage, TAG_MODEL_FINGERPRINT: found.fingerprint}
    number = registry.register("fresco", found.directory, tags).number
    move_champion(registry, "fresco", number)
    return number


@pytest.fixture
def ended(config: Config) -> Iterator[None]:
    """End the detached server whatever the test found."""
    yield
    serve.run(config, stop=True)


def test_without_a_champion_the_command_that_makes_one_is_told(config: Config, make_run) -> None:
    with pytest.raises(RegistryError, match=r"found no champion; run: fresco promote RUN_ID \(fresco train makes"):
        serve.run(config)
    make_run("fresco-aaa", 0)
    with pytest.raises(RegistryError, match=r"run: fresco promote fresco-aaa$"):
        serve.run(config, detach=True)


def test_port_in_use_is_refused_before_anything_starts(config: Config, make_run) -> None:
    make_run("fresco-aaa", 0)
    set_champion(config, "fresco-aaa")
    workspace = open_workspace(config.workspace)
    with closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        taken = config.model_copy(update={"serve": config.serve.model_copy(update={"port": port})})
        for detach in (False, True):
            with pytest.raises(PlacementError, match=f"127.0.0.1:{port} not usable: Address already in use"):
                serve.run(taken, detach=detach)
    assert not (workspace.root / "serving").exists() and not (workspace.root / "endpoint.json").exists()


def test_other_machines_are_let_in_with_keys_only(config: Config, tmp_path: Path, capsys) -> None:
    far = with_overrides(config, {"serve.host": "0.0.0.0"})
    with pytest.raises(PlacementError, match="without keys: anybody could draw"):
        serve.run(far)
    with pytest.raises(PlacementError, match=r"--set serve\.api_keys_file=FILE"):
        serve.make_key(config, "studio")
    keyed = with_overrides(far, {"serve.api_keys_file": str(tmp_path / "keys.yaml")})
    made = serve.make_key(keyed, "studio")
    assert made["key"] in capsys.readouterr().err and made["key"] not in (tmp_path / "keys.yaml").read_text()
    with pytest.raises(RegistryError, match="found no champion"):
        serve.run(keyed)


def test_replicas_on_several_machines_need_a_disk_in_common(
    config: Config, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRESCO_STAGE", str(tmp_path / "stage"))
    far = {"placement.ray_address": "ray://head:10001", "placement.tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"}
    on_s3 = with_overrides(config.model_copy(update={"workspace": f"{bucket}/team"}), {**far, "serve.max_replicas": 2})
    with pytest.raises(
        PlacementError, match=r"serve\.max_replicas expected 1 .* found 2: .* --set serve\.max_replicas=1"
    ):
        serve.run(on_s3)
    fine = ({"serve.max_replicas": 1}, {"placement.ray_address": ""})
    for change in (on_s3.model_copy(update={"workspace": config.workspace}), *(with_overrides(on_s3, c) for c in fine)):
        with pytest.raises(RegistryError, match="found no champion"):
            serve.run(change)


def test_record_names_an_address_that_those_who_may_ask_can_reach(config: Config) -> None:
    def told(**changes: str) -> str:
        return serve.told_url(config.serve.model_copy(update=changes), "http://127.0.0.1:8000")

    assert told() == told(public_url="http://elsewhere") == "http://127.0.0.1:8000"
    assert told(host="0.0.0.0") == "http://127.0.0.1:8000"
    assert told(host="0.0.0.0", public_url="http://serve:8000/") == "http://serve:8000"


def test_stop_without_a_server_says_so_and_removes_what_a_dead_one_left(config: Config, capsys) -> None:
    record = open_workspace(config.workspace).root / "endpoint.json"
    record.write_text(json.dumps({"url": "http://127.0.0.1:9", "pid": os.getpid(), "model_version": 1}))
    assert serve.run(config, stop=True) == {
        "url": "http://127.0.0.1:9",
        "model_version": 1,
        "pid": None,
        "stopped": False,
    }
    assert not record.exists() and "no endpoint runs" in capsys.readouterr().err


def test_server_that_lost_its_lease_leaves_its_successors_record(
    config: Config, make_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a laptop's sleep: another server took over while this one did not answer, and wrote its own record."""
    make_run("fresco-aaa", 0)
    set_champion(config, "fresco-aaa")
    record = open_workspace(config.workspace).root / "endpoint.json"

    @contextmanager
    def started(*arguments: object) -> Iterator[str]:
        yield "http://127.0.0.1:9"

    def replaced(later: int, *arguments: object) -> None:
        written = json.loads(record.read_text())
        assert written["pid"] == os.getpid()
        record.write_text(json.dumps({**written, "pid": written["pid"] + later}))
        raise EndpointError("the lock was taken over")

    monkeypatch.setattr(serve, "endpoint", started)
    for later, stays in ((1, True), (0, False)):
        monkeypatch.setattr(serve, "_watch", partial(replaced, later))
        with pytest.raises(EndpointError, match="taken over"):
            serve.run(config)
        assert record.exists() is stays


@pytest.fixture
def one_attempt(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The client asks S3 once: the pauses between attempts would be waited for at every look."""
    monkeypatch.setattr(s3, "MAX_ATTEMPTS", 1)
    s3._client_for.cache_clear()
    yield
    s3._client_for.cache_clear()


@pytest.mark.parametrize("back", [True, False], ids=["back", "away to the end"])
def test_storage_that_is_away_is_told_once_and_ends_no_endpoint(
    back: bool,
    config: Config,
    one_attempt: None,
    machines: Machines,
    s3_network: Network,
    tiny_pipelines: dict[int, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    workspace, tracking = machines.be("one"), f"sqlite:///{tmp_path / 'workspace' / 'mlflow.db'}"
    changes = {"placement.tracking_uri": tracking, "serve.follow_s": 0.1}
    on_s3 = with_overrides(config.model_copy(update={"workspace": machines.uri}), changes)
    run = workspace.run_dir("fresco-aaa")
    shutil.copytree(tiny_pipelines[0], run / "pipeline")
    keep_whole(run / "pipeline")
    write_record(run, {"pipeline": "pipeline"})
    found, registry = resolve_model(on_s3, "fresco-aaa"), Registry(workspace, tracking)
    number = registry.register("fresco", found.directory, {TAG_MODEL_FINGERPRINT: found.fingerprint}).number
    move_champion(registry, "fresco", number)
    looks: list[str] = []

    class Ready(BaseHTTPRequestHandler):
        """Draws on whatever the storage does, as replicas do; breaks and mends the network, then ends this process."""

        def do_GET(self) -> None:
            looks.append(self.path)
            if len(looks) == 2:
                s3_network.plan(Rule(RESET, 10**6))
            if len(looks) == 5 and back:
                s3_network.plan()
            if len(looks) == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            content = json.dumps({"status": "ready", "error": "", "model_version": number}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    @contextmanager
    def started(*arguments: object) -> Iterator[str]:
        with ThreadingHTTPServer(("127.0.0.1", 0), Ready) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
            thread.start()
            try:
                yield f"http://127.0.0.1:{server.server_address[1]}"
            finally:
                server.shutdown()
                thread.join()

    monkeypatch.setattr(serve, "endpoint", started)
    assert serve.run(on_s3)["model_version"] == number
    told = capsys.readouterr().err
    assert len(looks) == 7 and told.count("goes on drawing") == 1 and "ending: drawings at work" in told
    if back:
        assert any("PUT" in request and "endpoint.lock.epochs" in request for request in s3_network.seen)
    s3_network.plan()
    assert storage.exists(f"{machines.uri}/endpoint.json") is not back, "what a dead server left fools nobody"
    assert serve.endpoint_of(workspace) is None or not back


def test_detached_server_that_cannot_start_shows_the_end_of_its_log(config: Config, make_run) -> None:
    make_run("fresco-aaa", 0)
    set_champion(config, "fresco-aaa")
    lock = open_workspace(config.workspace).root / "locks" / "endpoint.lock"
    with (
        hold_lease(lock, "another server that is starting"),
        pytest.raises(EndpointError, match=r"(?s)found it ended \(1\):.*held by another server that is starting"),
    ):
        serve.run(config, detach=True)


def test_detached_server_serves_says_so_and_ends(config: Config, make_run, tmp_path: Path, ended: None) -> None:
    make_run("fresco-aaa", 0)
    version = set_champion(config, "fresco-aaa")
    # As a shell would: the caller's process is gone while the server goes on.
    written = tmp_path / "config.yaml"
    written.write_text(json.dumps(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "flows", "serve", "--config", str(written), "--detach", "--json"]
    asked = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert asked.returncode == 0, asked.stderr
    answer = json.loads(asked.stdout)
    assert answer["model_version"] == version and set(answer) == {"url", "model_version", "pid"}
    assert readiness(answer["url"]) == {
        "status": "ready",
        "error": "",
        "model_version": version,
        "dataset": "emblems@0123456789ab",
        "run_id": "fresco-aaa",
    }
    assert f"curl {answer['url']}/v1/images/generations" in asked.stderr

    assert serve.run(config, detach=True) == answer, "a second `serve` finds the first"
    seen = status.run(config)["endpoint"]
    assert (seen["url"], seen["pid"], seen["status"]) == (answer["url"], answer["pid"], "ready")

    drawn = generate.run(config, ["a red circle"], str(tmp_path / "out"), Wish(seed=3, n=2))
    here = generate.run(config, ["a red circle"], str(tmp_path / "here"), Wish(seed=3), model="models:/fresco@champion")
    assert drawn["model_version"] == here["model_version"] == version and drawn["seeds"] == [3, 4]
    with Image.open(drawn["files"][0]) as remote, Image.open(here["files"][0]) as local:
        shared = ("seed", "steps", "guidance_scale", "model_version", "dataset", "run_id")
        assert {key: remote.text[key] for key in shared} == {key: local.text[key] for key in shared}
        assert "prompt" in local.text and "prompt" not in remote.text
        # Two rows in one batch there, one row here: values move by about 1e-6, which can turn one rounding.
        assert max(abs(a - b) for a, b in zip(remote.tobytes(), local.tobytes(), strict=True)) <= 1
    with pytest.raises(EndpointError, match="found status 400: n expected 1 to 3, found 9"):
        generate.run(config, ["x"], str(tmp_path / "out"), Wish(n=9))

    assert verify.run(config, drawn["files"][0])["verdict"] == "valid"

    make_run("fresco-bbb", 1)
    newer = set_champion(config, "fresco-bbb")
    followed = serve.run(config, detach=True)
    assert followed == {**answer, "model_version": newer}, "the same process draws with the new champion"
    assert (readiness(answer["url"]) or {})["run_id"] == "fresco-bbb"
    assert generate.run(config, ["x"], str(tmp_path / "out"), Wish(seed=3))["model_version"] == newer

    answer = followed
    lock = open_workspace(config.workspace).root / "locks" / "endpoint.lock"
    lease = read_lease(lock)
    assert lease is not None and lease.pid == answer["pid"]
    assert serve.run(config, stop=True) == {**answer, "stopped": True}
    assert not process_is(lease)
    assert readiness(answer["url"]) is None
    assert not (open_workspace(config.workspace).root / "endpoint.json").exists()


@pytest.mark.parametrize(
    ("more", "told"), [([], "http://env:4318"), (["--set", "serve.otlp_endpoint=http://own:1"], "")]
)
def test_collector_comes_from_the_environment_unless_the_config_names_one(
    tmp_path: Path, more: list[str], told: str
) -> None:
    command = [sys.executable, "-m", "flows", "serve", "--dry-run", "--json", "--workspace", str(tmp_path), *more]
    env = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": "http://env:4318"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["config"]["serve"]["otlp_endpoint"] == (told or "http://own:1")
