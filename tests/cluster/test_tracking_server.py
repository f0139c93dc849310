"""The registry on a real `mlflow server`, over SQLite and over PostgreSQL, does what the embedded default does."""

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster.artifacts import open_workspace, read_journal
from cluster.champion import move_champion, retire, roll_back, set_challenger, settle
from cluster.errors import RegistryError, TrackingError
from cluster.registry import CHALLENGER, CHAMPION, PREVIOUS, TAG_MODEL_FINGERPRINT, TAG_RUN, Registry
from tests.servers import free_port, mlflow_server, postgres

pytestmark = pytest.mark.slow  # real servers, two of them over PostgreSQL


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `mlflow server` over a database of its own, once for each kind."""
    folder = tmp_path_factory.mktemp(request.param)
    with ExitStack() as stack:
        if request.param == "postgresql":
            # Not below pytest's folder: that is closed to the account PostgreSQL runs as, and too long for its socket.
            own = stack.enter_context(tempfile.TemporaryDirectory(prefix="fresco-pg-"))
            store = stack.enter_context(postgres(Path(own), folder / "postgres.log"))
        else:
            store = f"sqlite:///{folder / 'mlflow.db'}"
        process = stack.enter_context(mlflow_server(folder, store, port := free_port()))
        assert process.poll() is None
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def registry(server: str, tmp_path: Path) -> Registry:
    return Registry(open_workspace(str(tmp_path / "workspace")), server)


def register(registry: Registry, name: str, run_id: str) -> int:
    pipeline = registry.workspace.run_dir(run_id) / "pipeline"
    pipeline.mkdir(parents=True)
    return registry.register(name, pipeline, {TAG_RUN: run_id, TAG_MODEL_FINGERPRINT: f"weights of {run_id}"}).number


def test_versions_aliases_and_journal_on_a_tracking_server(registry: Registry, request) -> None:
    name = request.node.name
    assert registry.by_alias(name, CHAMPION) is None and registry.versions(name) == []
    assert [register(registry, name, run_id) for run_id in ("a", "b b", "ü")] == [1, 2, 3]
    assert registry.directory_of(registry.by_number(name, 2)) == registry.workspace.run_dir("b b") / "pipeline"
    for number in (1, 2):
        set_challenger(registry, name, number)
        move_champion(registry, name, number, {"reasons": ["test"]})
    set_challenger(registry, name, None)
    assert registry.by_alias(name, CHALLENGER) is None
    move = roll_back(registry, name, {"reasons": ["test"]})
    assert move.previous is not None and (move.champion.number, move.previous.number) == (1, 2)
    again = Registry(registry.workspace, registry.tracking_uri)
    champion, previous = again.by_alias(name, CHAMPION), again.by_alias(name, PREVIOUS)
    assert champion is not None and previous is not None and (champion.number, previous.number) == (1, 2)
    assert [line["champion"] for line in read_journal(registry.workspace) if "champion" in line] == [1, 2, 1]
    assert [version.number for version in retire(registry, name, 0)] == [3]
    registry.set_alias(name, CHAMPION, 3)
    assert len(settle(registry, name)) == 1 and settle(registry, name) == []
    assert not (registry.workspace.root / "mlflow.db").exists(), "nothing is kept beside the server"


def test_missing_version_and_dead_server_are_told_apart(registry: Registry, request) -> None:
    with pytest.raises(RegistryError, match="found versions: none"):
        registry.by_number(request.node.name, 1)
    with pytest.raises(RegistryError, match=r"model registry expected to answer.*INVALID_PARAMETER_VALUE"):
        register(registry, "", "a")
    dead = Registry(registry.workspace, f"http://127.0.0.1:{free_port()}")
    with pytest.raises(TrackingError, match=r"model registry expected to answer.*found: nothing answers there"):
        dead.versions("fresco")


def test_server_that_ends_could_not_be_asked_and_answers_again_when_it_is_back(tmp_path: Path) -> None:
    port, store = free_port(), f"sqlite:///{tmp_path / 'mlflow.db'}"
    registry = Registry(open_workspace(str(tmp_path / "workspace")), f"http://127.0.0.1:{port}")
    calls: list[Callable[[], object]] = [
        lambda: registry.by_alias("fresco", CHAMPION),
        lambda: registry.by_number("fresco", 1),
        lambda: registry.versions("fresco"),
        lambda: register(registry, "fresco", "b"),
        lambda: registry.tag(version, {"fresco.decision": "hold"}),
        lambda: registry.set_alias("fresco", CHAMPION, 1),
    ]
    with mlflow_server(tmp_path, store, port):
        version = registry.by_number("fresco", register(registry, "fresco", "a"))
    for call in calls:
        with pytest.raises(TrackingError, match="found: nothing answers there"):
            call()
        shutil.rmtree(registry.workspace.run_dir("b"), ignore_errors=True)  # `register` makes it
    with mlflow_server(tmp_path, store, port):
        for call in calls:
            call()


class Broken(BaseHTTPRequestHandler):
    """Answers as the class says, in no form of MLflow's."""

    status, body = 500, b"<html>"

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (500, b'{"error_code": "INTERNAL_ERROR", "message": "database is gone"}', TrackingError),
        (502, b"<html>bad gateway</html>", TrackingError),
        (503, b"", TrackingError),
        (429, b'{"error_code": "REQUEST_LIMIT_EXCEEDED", "message": "slow down"}', TrackingError),
        (403, b'{"error_code": "PERMISSION_DENIED", "message": "not yours"}', RegistryError),
        (403, b'{"reason": "a gateway that is not MLflow"}', RegistryError),
        (401, b"<html>who are you?</html>", RegistryError),
    ],
)
def test_answers_that_refuse_and_those_that_are_none_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, body: bytes, kind: type[Exception]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    handler = type("Handler", (Broken,), {"status": status, "body": body})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        registry = Registry(open_workspace(str(tmp_path)), f"http://127.0.0.1:{server.server_port}")
        try:
            with pytest.raises(kind, match="model registry expected to answer"):
                registry.by_alias("fresco", CHAMPION)
        finally:
            server.shutdown()
            thread.join()
