"""Real servers for tests: started on free ports of 127.0.0.1, waited for, and ended by their own process group."""

import os
import pwd
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

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


def wait_for(
    ready: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Path, limit_s: float = START_LIMIT_S
) -> None:
    deadline = time.monotonic() + limit_s
    while not ready():
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


@contextmanager
def mlflow_server(folder: Path, store: str, port: int) -> Iterator["subprocess.Popen[bytes]"]:
    """`mlflow server` over a database, artifacts in `folder`; yields its process once it answers on the port."""
    log = folder / "mlflow.log"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", store, "--artifacts-destination", str(folder / "files")]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    with running(command, log, cwd=folder, env=environment) as process:

        def answers() -> bool:
            try:
                return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5, trust_env=False).status_code == 200
            except httpx.HTTPError:
                return False

        wait_for(answers, process, log)
        yield process
