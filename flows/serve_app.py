"""The endpoint for a Ray Serve that somebody else runs: `import_path: flows.serve_app:app` of KubeRay's RayService.

`fresco serve` starts Serve and stays to follow the registry. Here Serve is there already: `app` is the builder that it
calls, with `args` as the command line's options, and `follow` runs beside the replicas: it holds the workspace's lease
of the endpoint, writes endpoint.json, and follows champion and challenger. Two Serves of one workspace, as during an
upgrade of a RayService, draw both; one of them follows, the other waits for its lease.
"""

import os
import threading
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from cluster.api_keys import check_exposure
from cluster.artifacts import open_workspace
from cluster.carry import Carry
from cluster.errors import StorageError
from cluster.lease import hold_lease
from cluster.registry import CHAMPION
from cluster.serving import ModelSource, make_application, readiness
from flows.config import Config, load_config
from flows.console import say
from flows.follow import Follower
from flows.models import resolve_model
from flows.paint import FACTORY
from flows.serve import champion_of, check_replicas, lock_of, remove_record

FOLLOW = "flows.serve_app:follow"
SERVE_PORT = 8000
"""Where Ray Serve listens unless its `http_options` say otherwise."""
LEASE_WAIT_S = 5.0


class AppArguments(BaseModel):
    """What `args` may say: the options of the command line, and nothing else."""

    model_config = ConfigDict(extra="forbid")

    config: str | None = None
    """YAML file, on every node."""
    preset: str | None = None
    set: list[str] = []
    """path=value, as for --set."""
    workspace: str | None = None
    """Default: the environment variable FRESCO_WORKSPACE, then the config's."""


def app(arguments: AppArguments) -> Any:
    """Build the endpoint of the champion, a Serve application; what cannot serve is refused here.

    Serve shows the message.
    """
    config = _config(arguments)
    # Where somebody else's Serve listens is not ours to see; on a cluster it is every address.
    check_exposure(config.serve.model_copy(update={"host": "0.0.0.0"}))
    check_replicas(config, many_machines=True)
    workspace = open_workspace(config.workspace)
    champion_of(config, workspace)
    model = resolve_model(config, f"models:/{config.name}@{CHAMPION}")
    follower = Follower(config, workspace, model)
    carry = Carry.of(keep=[workspace.captured])
    source = ModelSource(FACTORY, follower.arguments, config.name, str(workspace.root), follower.follow, carry)
    beside = {"function": FOLLOW, "arguments": arguments.model_dump()}
    return make_application(source, config.serve, beside)


def follow(arguments: Mapping[str, Any], ended: threading.Event) -> None:
    """Follow the registry until `ended`, as one of all that want to; raises what ends it before."""
    config = _config(AppArguments.model_validate(arguments))
    workspace = open_workspace(config.workspace)
    while not ended.is_set():
        try:
            with hold_lease(lock_of(workspace), "fresco serve (Ray Serve application)", wait_s=LEASE_WAIT_S) as confirm:
                _follow(config, confirm, ended)
        except StorageError as error:
            say(f"this endpoint does not follow the champion now: {error}")
            ended.wait(LEASE_WAIT_S)


def _follow(config: Config, confirm: Any, ended: threading.Event) -> None:
    """Look every `serve.follow_s` while the lease is ours; endpoint.json is there from the first picture on."""
    workspace = open_workspace(config.workspace)
    url = f"http://127.0.0.1:{config.serve.port or SERVE_PORT}"
    follower = Follower(config, workspace, resolve_model(config, f"models:/{config.name}@{CHAMPION}"))
    try:
        while not ended.wait(config.serve.follow_s):
            confirm()
            status = readiness(url)
            if status is None:
                continue
            if not follower.record and status["status"] == "ready":
                follower.write_record(config.serve.public_url.rstrip("/") or url, os.getpid(), status["model_version"])
            if follower.record:
                follower.look(status)
    finally:
        remove_record(workspace, os.getpid())


def _config(arguments: AppArguments) -> Config:
    place = arguments.workspace or os.environ.get("FRESCO_WORKSPACE")
    return load_config(arguments.config, arguments.preset, arguments.set, place)
