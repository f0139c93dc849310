"""Which model should the endpoint draw with? `fresco serve` asks the registry and writes it down; replicas read that.

So the registry is asked by one process, and a replica that starts late finds the same answer. A replica loads what is
written beside what it has; `endpoint.json` names a version once the endpoint says that it draws with it.
"""

import time
from pathlib import Path
from typing import Any

from cluster.artifacts import Workspace, read_json, write_json_atomic
from cluster.errors import RegistryError, StorageError, TrackingError
from cluster.painter_bridge import Follow
from cluster.proxy_face import ASLEEP
from cluster.registry import CHAMPION, Registry
from components.errors import InputError
from flows.config import Config
from flows.console import say
from flows.models import ResolvedModel, resolve_model
from flows.paint import painter_arguments

RESOLVER = "flows.follow:read_wanted"
ENDPOINT = "endpoint.json"


def read_wanted(path: str) -> dict[str, Any] | None:
    """Return the painter's arguments for the model that should serve, None when nothing is written."""
    wanted: dict[str, Any] | None = read_json(Path(path))
    return wanted


class Follower:
    """Follows the champion for one endpoint; `record` is what its `endpoint.json` says."""

    def __init__(self, config: Config, workspace: Workspace, model: ResolvedModel) -> None:
        self._config, self._workspace = config, workspace
        self._registry = Registry(workspace, config.placement.tracking_uri)
        self._told = ""
        self.record: dict[str, Any] = {}
        self.arguments = self._write(model)

    @property
    def follow(self) -> Follow:
        """What a replica is told."""
        return Follow(RESOLVER, {"path": str(self._path)}, self._config.serve.follow_s)

    def write_record(self, url: str, pid: int, version: int | None) -> dict[str, Any]:
        """Write down who serves what, and since when."""
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.record = {"url": url, "pid": pid, "model_version": version, "since": since}
        write_json_atomic(self._workspace.root / ENDPOINT, self.record)
        return self.record

    def look(self, status: dict[str, Any]) -> None:
        """Compare champion, what is written and what `status` (of /readyz) says; what cannot be had now is told once.

        A registry that is away, or a version whose weights changed, leaves everything as it is.
        """
        # Whatever wakes from sleep loads what is written.
        drawing = self._wanted if status["status"] == ASLEEP else status["model_version"]
        if status["status"] in ("ready", ASLEEP) and drawing != self.record["model_version"]:
            self.write_record(self.record["url"], self.record["pid"], drawing)
            say(f"{self.record['url']} serves version {drawing}; rows at work finish on the one before")
        try:
            champion = self._registry.by_alias(self._config.name, CHAMPION)
            if champion is not None and champion.number != self._wanted:
                self._write(resolve_model(self._config, champion.uri))
                say(f"the champion is version {champion.number}: it is loaded beside the one that serves")
            problem = status["error"]
        except (RegistryError, TrackingError, StorageError, InputError, OSError) as error:
            problem = str(error)
        if problem and problem != self._told:
            say(f"the endpoint stays with version {self.record['model_version']}: {problem}")
        self._told = problem

    @property
    def _path(self) -> Path:
        return self._workspace.root / "serving" / "wanted.json"

    def _write(self, model: ResolvedModel) -> dict[str, Any]:
        device = "cuda" if self._config.serve.gpus_per_replica else "cpu"
        arguments = painter_arguments(self._config, model, device)
        write_json_atomic(self._path, arguments)
        self._wanted = model.version
        return arguments
