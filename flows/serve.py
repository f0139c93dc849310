"""fresco serve: put the champion behind HTTP, in this terminal or detached, one endpoint for each workspace.

In order: find the champion, refuse what cannot work (no champion, a port in use), start, draw a first picture, write
`endpoint.json`, wait to be ended, clean up. Who serves is known by a lease, so a dead server's file fools nobody.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flows
from cluster import stage, storage
from cluster.api_keys import check_exposure, is_loopback
from cluster.artifacts import Workspace, finished, open_workspace, read_json, write_json_atomic
from cluster.carry import Carry
from cluster.errors import EndpointError, LeaseLostError, PlacementError, RegistryError, StorageError
from cluster.lease import Lease, describe, hold_lease, process_is, read_lease
from cluster.placement import ServeSection
from cluster.registry import CHAMPION, Registry, Version
from cluster.serving import ModelSource, endpoint, find_port, readiness
from cluster.signals import ended_by_signals
from flows.config import Config, told_config
from flows.console import program, say, step

if TYPE_CHECKING:
    from flows.follow import Follower

POLL_S = 0.25
TELL_EVERY_S = 5.0
UNREACHABLE_LIMIT_S = 60.0
END_LIMIT_S = 60.0
"""For what comes after `serve.drain_s`: ending Ray."""
LOG_TAIL_LINES = 15


def run(config: Config, detach: bool = False, stop: bool = False) -> dict[str, Any]:
    """Serve the champion until SIGINT or SIGTERM; `detach` returns once it answers, `stop` ends the running one."""
    workspace = open_workspace(config.workspace)
    if stop:
        return _stop(workspace, config.serve.drain_s + END_LIMIT_S)
    check_exposure(config.serve)
    check_replicas(config, many_machines=bool(config.placement.ray_address))
    champion = champion_of(config, workspace)
    running = endpoint_of(workspace)
    if running is not None and running["model_version"] == champion.number:
        say(f"the endpoint runs already: {running['url']} serves {champion.uri}")
        return _result(running)
    if running is not None:
        say(f"{running['url']} serves version {running['model_version']} and follows the champion to {champion.uri}")
        return _result(_wait_for_version(config, workspace, champion.number))
    find_port(config.serve.host, config.serve.port)
    if detach:
        return _result(_detach(config, workspace))
    return _result(_serve_here(config, workspace))


def make_key(config: Config, name: str) -> dict[str, Any]:
    """Add a key to `serve.api_keys_file` and show it, once: the file keeps its hash only."""
    from cluster.api_keys import new_key

    if not config.serve.api_keys_file:
        raise PlacementError(
            "serve.api_keys_file expected with --new-key, found none; add --set serve.api_keys_file=FILE"
        )
    path = Path(config.serve.api_keys_file)
    key = new_key(path, name)
    say(f"key {name!r}, shown once; {path} keeps its hash, and its rate limit (each replica's) and priority to edit:")
    say(f"  {key}")
    return {"name": name, "key": key, "file": str(path)}


def plan(config: Config) -> list[str]:
    """Say what `run` would do."""
    port = config.serve.port or "a free port"
    return [
        f"find models:/{config.name}@{CHAMPION} and check that its weights are those that were promoted",
        f"start Ray with a replica of {config.serve.cpus_per_replica:g} CPU and {config.serve.gpus_per_replica:g} GPU",
        f"draw a first picture, then answer on {config.serve.host}, {port}, until ended",
        f"look every {config.serve.follow_s:g} s which versions are champion and challenger, and load new ones",
    ]


def endpoint_of(workspace: Workspace) -> dict[str, Any] | None:
    """Return endpoint.json {url, pid, model_version, since} of a live server, None when none runs (yet)."""
    record = read_json(_record(workspace))
    holder = server_of(workspace)
    return record if record is not None and holder is not None and holder.pid == record["pid"] else None


def server_of(workspace: Workspace) -> Lease | None:
    """Return the lease of the process that serves, or is about to serve, this workspace."""
    return read_lease(lock_of(workspace))


def champion_of(config: Config, workspace: Workspace) -> Version:
    """Return the champion; RegistryError with the command that makes one where there is none."""
    champion = Registry(workspace, config.placement.tracking_uri).by_alias(config.name, CHAMPION)
    if champion is not None:
        return champion
    runs = finished(workspace.runs)
    which = runs[-1].name if runs else "RUN_ID (fresco train makes a run)"
    raise RegistryError(
        f"models:/{config.name}@champion expected in the registry, found no champion; run: fresco promote {which}"
    )


def check_replicas(config: Config, many_machines: bool) -> None:
    """Refuse replicas on several machines that have no disk in common: a client would find half of what it asks for."""
    most = config.serve.max_replicas
    if many_machines and most > 1 and storage.is_s3(config.workspace):
        raise PlacementError(
            "serve.max_replicas expected 1 with a workspace on S3 and a Ray cluster, found"
            f" {most}: pictures by url and cancellations lie on the machine of one replica; add"
            " --set serve.max_replicas=1, or use a workspace on a disk that all machines share"
        )


def _serve_here(config: Config, workspace: Workspace) -> dict[str, Any]:
    """Block while the endpoint runs."""
    from flows.follow import Follower
    from flows.models import resolve_model
    from flows.paint import FACTORY

    with ended_by_signals(), hold_lease(lock_of(workspace), "fresco serve", wait_s=2) as confirm:
        model = resolve_model(config, f"models:/{config.name}@{CHAMPION}")
        step(f"serving models:/{model.name}/{model.version} ({model.run_id or model.directory})")
        say(f"starting Ray and loading the model (ready within {config.serve.ready_limit_s:.0f} s)")
        follower = Follower(config, workspace, model)
        carry = Carry.of(keep=[workspace.captured])
        source = ModelSource(FACTORY, follower.arguments, config.name, str(workspace.root), follower.follow, carry)
        with endpoint(source, config.serve, config.placement) as url:
            _say_ready(follower.write_record(told_url(config.serve, url), os.getpid(), model.version))
            try:
                _watch(url, confirm, follower, config.serve.follow_s)
            except KeyboardInterrupt:
                say("ending: drawings at work are finished first")
            finally:
                with suppress(StorageError):  # the lease ends too, so what stays there fools nobody
                    remove_record(workspace, os.getpid())
    return follower.record


def _watch(url: str, confirm: Any, follower: "Follower", every_s: float) -> None:
    """Wait for ever, as long as the endpoint answers and the lease is ours; follow the champion meanwhile."""
    silent: float | None = None
    away = False
    while True:
        time.sleep(every_s)
        status = readiness(url)
        silent = None if status is not None else silent or time.monotonic()
        if silent is not None and time.monotonic() - silent > UNREACHABLE_LIMIT_S:
            raise EndpointError(
                f"endpoint expected to answer at {url}, found no answer for {UNREACHABLE_LIMIT_S:.0f} s: Ray or the"
                " replica is gone; start it again with: fresco serve"
            )
        try:
            confirm()
            if status is not None:
                follower.look(status)
            away = False
        except LeaseLostError:
            raise
        except StorageError as error:  # drawing needs none: told once, until it answers again
            if not away:
                say(f"the endpoint goes on drawing, and follows no champion until the workspace answers: {error}")
            away = True


def _detach(config: Config, workspace: Workspace) -> dict[str, Any]:
    """Start the same verb as the leader of its own session and wait until it is ready."""
    folder = workspace.root / "serving"
    written = told_config(config.model_copy(update={"workspace": workspace.uri}).model_dump(mode="json"))
    write_json_atomic(folder / "config.yaml", written)  # JSON is YAML
    log = folder / "serve.log"
    package = str(Path(flows.__file__).parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    # The workspace is named too: FRESCO_WORKSPACE in the environment would win over the file.
    options = ["--config", str(folder / "config.yaml"), "--workspace", workspace.uri]
    with log.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "flows", "serve", *options],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
    try:
        step(f"starting the endpoint in process {child.pid}; its log is {log}")
        record = _wait_for_child(child, workspace, log, config.serve.ready_limit_s)
    except BaseException:  # who is interrupted must not leave it behind either
        child.terminate()
        child.wait(config.serve.drain_s + END_LIMIT_S)
        raise
    child.returncode = 0  # it outlives this process on purpose
    _say_ready(record)
    say(f"end it with: {program()} serve --stop --workspace {config.workspace}")
    return record


def _wait_for_child(
    child: "subprocess.Popen[bytes]", workspace: Workspace, log: Path, limit_s: float
) -> dict[str, Any]:
    start = told = time.monotonic()
    while True:
        record = endpoint_of(workspace)
        if record is not None and record["pid"] == child.pid:
            return record
        now = time.monotonic()
        if child.poll() is not None:
            raise EndpointError(f"endpoint expected to start, found it ended ({child.returncode}):\n{_tail(log)}")
        if now - start > limit_s:
            raise EndpointError(f"endpoint expected within {limit_s:.0f} s, found it not ready:\n{_tail(log)}")
        if now - told >= TELL_EVERY_S:
            told = now
            last = _tail(log, 1) or "starting"
            say(f"waiting for the endpoint: {now - start:.0f} s of at most {limit_s:.0f} s: {last}")
        time.sleep(POLL_S)


def _wait_for_version(config: Config, workspace: Workspace, number: int) -> dict[str, Any]:
    """Wait until the running endpoint draws with a version; EndpointError past the limit, or when it ends."""
    start = time.monotonic()
    limit_s = config.serve.ready_limit_s * config.serve.max_replicas  # they load one after the other
    while (record := endpoint_of(workspace)) is not None:
        if record["model_version"] == number:
            return record
        if time.monotonic() - start > limit_s:
            raise EndpointError(
                f"endpoint expected to serve version {number} within {limit_s:.0f} s, found it still on version"
                f" {record['model_version']}; its terminal or serving/serve.log says why; fresco serve --stop ends it"
            )
        time.sleep(POLL_S)
    raise EndpointError("endpoint expected to follow the champion, found it ended; start it with: fresco serve")


def _stop(workspace: Workspace, limit_s: float) -> dict[str, Any]:
    """End the server of this workspace; the lease says which process that is, so no stranger is ended."""
    record = read_json(_record(workspace)) or {"url": None, "model_version": None}
    holder = server_of(workspace)
    if holder is None:
        stage.remove(_record(workspace))
        say(f"no endpoint runs for {workspace.uri}")
        return {**_result({**record, "pid": None}), "stopped": False}
    if holder.host != os.uname().nodename:
        raise EndpointError(f"endpoint expected on this machine, found {describe(holder)}; end it there")
    os.kill(holder.pid, signal.SIGTERM)
    say(f"ending process {holder.pid} (at most {limit_s:.0f} s)")
    start = time.monotonic()
    while process_is(holder):
        if time.monotonic() - start > limit_s:
            raise EndpointError(
                f"endpoint expected to end within {limit_s:.0f} s, found process {holder.pid} still there; end it"
                f" with: kill -9 {holder.pid}"
            )
        time.sleep(POLL_S)
    remove_record(workspace, holder.pid)
    return {**_result({**record, "pid": holder.pid}), "stopped": True}


def _say_ready(record: dict[str, Any]) -> None:
    say(f"ready: {record['url']} serves version {record['model_version']} (a page to try it: {record['url']})")
    body = json.dumps({"prompt": "a small red circle on a blue background", "seed": 1})
    say(f"  curl {record['url']}/v1/images/generations -H 'Content-Type: application/json' -d '{body}'")


def _result(record: dict[str, Any]) -> dict[str, Any]:
    return {key: record.get(key) for key in ("url", "model_version", "pid")}


def _record(workspace: Workspace) -> Path:
    return workspace.root / "endpoint.json"


def remove_record(workspace: Workspace, pid: int) -> None:
    """Take our endpoint.json away; one that a successor wrote meanwhile stays."""
    record = read_json(_record(workspace))
    if record is not None and record["pid"] == pid:
        stage.remove(_record(workspace))


def told_url(settings: ServeSection, url: str) -> str:
    """Return the address for endpoint.json: on an endpoint for other machines, the one at which they reach it."""
    return settings.public_url.rstrip("/") if settings.public_url and not is_loopback(settings.host) else url


def lock_of(workspace: Workspace) -> str:
    """Whose lease says which process looks after the workspace's endpoint."""
    return workspace.place("locks", "endpoint.lock")


def _tail(log: Path, lines: int = LOG_TAIL_LINES) -> str:
    written = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join(written[-lines:])
