"""The registry on a real `mlflow server`, over SQLite and over PostgreSQL, does what the embedded default does."""

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from cluster.artifacts import open_workspace, read_journal
from cluster.champion import move_champion, retire, roll_back, set_challenger, settle
from cluster.errors import RegistryError
from cluster.registry import CHALLENGER, CHAMPION, PREVIOUS, TAG_MODEL_FINGERPRINT, TAG_RUN, Registry

pytestmark = pytest.mark.slow  # real servers, two of them over PostgreSQL

START_LIMIT_S = 120
POLL_S = 0.2


def postgres_folder() -> Path | None:
    """Where Debian puts initdb and postgres, newest first, or wherever they are on the path."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: -float(path.parent.name))
    named = shutil.which("initdb")
    folders += [Path(named).parent] if named else []
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: list[str], log: Path, **options: object) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a server for the length of the block and end it, and nothing else, by its own process group."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 2)
            process.wait(60)


def wait_for(ready: object, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while not ready():  # type: ignore[operator]
        assert process.poll() is None, f"the server ended:\n{log.read_text()}"
        assert time.monotonic() < deadline, f"the server did not answer:\n{log.read_text()}"
        time.sleep(POLL_S)


@contextmanager
def postgres(folder: Path, log: Path) -> Iterator[str]:
    """A cluster of its own in `folder` over a free port; PostgreSQL refuses to run as root."""
    binaries = postgres_folder()
    if binaries is None:
        pytest.skip("no initdb found: apt-get install -y postgresql (continuous integration does)")
    person = {}
    if os.getuid() == 0:
        try:
            account = pwd.getpwnam("postgres")
        except KeyError:
            account = pwd.getpwnam("nobody")
        os.chown(folder, account.pw_uid, account.pw_gid)
        person = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    data, port = folder / "data", free_port()
    initdb = [str(binaries / "initdb"), "-D", str(data), "-U", "fresco", "--auth=trust", "--no-sync", "-E", "UTF8"]
    subprocess.run(initdb, check=True, capture_output=True, cwd=folder, **person)  # type: ignore[call-overload]
    options = ["-c", "listen_addresses=127.0.0.1", "-c", f"port={port}", "-c", "fsync=off"]
    command = [str(binaries / "postgres"), "-D", str(data), "-k", str(folder), *options]
    with running(command, log, cwd=folder, **person) as process:
        import psycopg2

        def answers() -> bool:
            try:
                psycopg2.connect(host="127.0.0.1", port=port, user="fresco", dbname="postgres").close()
                return True
            except psycopg2.OperationalError:
                return False

        wait_for(answers, process, log)
        yield f"postgresql+psycopg2://fresco@127.0.0.1:{port}/postgres"


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
        port, log = free_port(), folder / "mlflow.log"
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--workers", "1", "--backend-store-uri", store, "--artifacts-destination", str(folder / "files")]
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
        process = stack.enter_context(running(command, log, cwd=folder, env=environment))
        url = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            try:
                return httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200
            except httpx.HTTPError:
                return False

        wait_for(answers, process, log)
        yield url


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
    assert [line["champion"] for line in read_journal(registry.workspace)] == [1, 2, 1]
    assert [version.number for version in retire(registry, name, 0)] == [3]
    registry.set_alias(name, CHAMPION, 3)
    assert len(settle(registry, name)) == 1 and settle(registry, name) == []
    assert not (registry.workspace.root / "mlflow.db").exists(), "nothing is kept beside the server"


def test_missing_version_and_dead_server_are_told_apart(registry: Registry, request) -> None:
    with pytest.raises(RegistryError, match="found versions: none"):
        registry.by_number(request.node.name, 1)
    dead = Registry(registry.workspace, f"http://127.0.0.1:{free_port()}")
    with pytest.raises(RegistryError, match="model registry expected to answer"):
        dead.versions("fresco")
