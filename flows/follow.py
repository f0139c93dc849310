"""Which models should the endpoint draw with? `fresco serve` asks the registry and writes it down; replicas read that.

So the registry is asked by one process, and a replica that starts late finds the same answer. A replica loads what is
written beside what it has, each at its own pace; `endpoint.json` names a version once all replicas draw with it.
"""

import time
from pathlib import Path
from typing import Any

from cluster.artifacts import Workspace, read_json, write_json_atomic
from cluster.canary import read_trial, trial_lives
from cluster.errors import RegistryError, StorageError, TrackingError
from cluster.metric_files import metrics_folder, versions_of_replicas
from cluster.painter_loading import Follow
from cluster.proxy_face import ASLEEP
from cluster.registry import CHALLENGER, CHAMPION, Registry, Version
from cluster.serving import APPLICATION
from components.errors import InputError
from flows.config import Config, with_overrides
from flows.console import say
from flows.models import ResolvedModel, resolve_model
from flows.paint import painter_arguments

RESOLVER = "flows.follow:read_wanted"
ENDPOINT = "endpoint.json"
LOOK_EVERY_S = 1.0
"""Between two looks of a replica at what is written."""
TELL_AGAIN_S = 60.0
"""A problem that was away for so long is told again."""


def read_wanted(path: str) -> dict[str, Any] | None:
    """Return the painter's arguments for the models that should serve, None when nothing is written."""
    wanted: dict[str, Any] | None = read_json(Path(path))
    return wanted


class Follower:
    """Follows champion and challenger for one endpoint; `record` is what its `endpoint.json` says."""

    def __init__(self, config: Config, workspace: Workspace, model: ResolvedModel) -> None:
        self._config, self._workspace = config, workspace
        self._registry = Registry(workspace, config.placement.tracking_uri)
        self._told: dict[str, float] = {}
        self._kept: int | None = None
        self.record: dict[str, Any] = {}
        self._share = config.serve.challenger_share
        self.arguments = self._write(model, None, self._share)

    @property
    def follow(self) -> Follow:
        """What a replica is told."""
        serve = self._config.serve
        # A small file, where the registry may be a server: replicas need not add their own wait to the one before it.
        every_s = min(LOOK_EVERY_S, serve.follow_s)
        before = {"path": str(self._drawn)}
        return Follow(RESOLVER, {"path": str(self._path)}, every_s, before, serve.swap_wait_s, serve.max_queue)

    def write_record(self, url: str, pid: int, version: int | None) -> dict[str, Any]:
        """Write down who serves what, and since when."""
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        record = {"url": url, "pid": pid, "model_version": version, "since": since}
        write_json_atomic(self._workspace.root / ENDPOINT, record)
        self.record = record  # only now: what could not be written is written at the next look
        return record

    def look(self, status: dict[str, Any]) -> None:
        """Compare aliases, what is written and what `status` (of /readyz) says; what cannot be had now is told once.

        A registry that is away, or a version whose weights changed, leaves everything as it is.
        """
        if read_wanted(str(self._path)) != self._written:  # an application that started beside this one wrote its own
            write_json_atomic(self._path, self._written)
        drawing = self._drawing(status)
        if status["status"] in ("ready", ASLEEP) and drawing != self.record["model_version"]:
            self.write_record(self.record["url"], self.record["pid"], drawing)
            say(f"{self.record['url']} serves version {drawing}; rows at work finish on the one before")
        if status["status"] == "ready" and drawing == self._champion.version and self._kept != drawing:
            write_json_atomic(self._drawn, read_wanted(str(self._path)))
            self._kept = drawing
        problems = [status.get("reason") or status["error"]]
        for follow in (self._follow_champion, self._follow_challenger):
            try:
                follow()
            except (RegistryError, TrackingError, StorageError, InputError, OSError) as error:
                problems.append(str(error))
        now = time.monotonic()
        for problem in filter(None, problems):
            # `status` is of another replica each time, so what one has is not told at every look.
            if now - self._told.get(problem, float("-inf")) > TELL_AGAIN_S:
                say(f"the endpoint stays with version {self.record['model_version']}: {problem}")
            self._told[problem] = now
        self._told = {problem: at for problem, at in self._told.items() if now - at <= TELL_AGAIN_S}

    def _drawing(self, status: dict[str, Any]) -> int | None:
        """Return the version that all replicas draw with, what is recorded while they differ."""
        if status["status"] == ASLEEP:
            return self._champion.version  # whatever wakes loads what is written
        if self._config.serve.max_replicas == 1:
            return status["model_version"]
        found = versions_of_replicas(metrics_folder(self._workspace.root, APPLICATION))
        if not found:  # nothing can be written there: the one that was asked is the only one known
            return status["model_version"]
        (one, *more) = found
        return int(one) if not more and one.isdigit() else self.record["model_version"]

    def _follow_champion(self) -> None:
        champion = self._registry.by_alias(self._config.name, CHAMPION)
        if champion is not None and champion.number != self._champion.version:
            self._write(resolve_model(self._config, champion.uri), self._challenger, self._share)
            say(f"the champion is version {champion.number}: it is being loaded")

    def _follow_challenger(self) -> None:
        """One that cannot be had leaves the champion alone."""
        found, share = self._wanted_challenger()
        wanted = None if found is None or found.number == self._champion.version else found
        known = None if self._challenger is None else self._challenger.version
        if wanted is None and self._challenger is not None:
            self._write(self._champion, None, self._config.serve.challenger_share)
            say(f"version {known} is the challenger no more: it is let go after its last picture")
        elif wanted is not None and (wanted.number, share) != (known, self._share):
            self._write(self._champion, resolve_model(self._config, wanted.uri), share)
            answers = f"it answers {share:.0%} of requests and repeats {self._config.serve.shadow_share:.0%}"
            say(f"the challenger is version {wanted.number}: {answers}")

    def _wanted_challenger(self) -> tuple[Version | None, float]:
        """Return the challenger with its share of the requests; the registry is asked only where one would draw.

        A trial (`cluster.canary`) has a share of its own. One whose process is gone has ended.
        """
        name, serve = self._config.name, self._config.serve
        trial = read_trial(self._registry, name)
        lives = trial is not None and trial_lives(self._registry, name)
        if not (serve.challenger_share or serve.shadow_share or lives):
            return None, 0.0
        found = self._registry.by_alias(name, CHALLENGER)
        tried = trial if trial is not None and found is not None and found.number == trial.version else None
        if tried is None:
            return found, serve.challenger_share
        return (found, tried.share) if lives else (None, 0.0)

    @property
    def _drawn(self) -> Path:
        """What `_path` said when the endpoint last drew with it."""
        return self._workspace.root / "serving" / "drawn.json"

    @property
    def _path(self) -> Path:
        return self._workspace.root / "serving" / "wanted.json"

    def _write(self, champion: ResolvedModel, challenger: ResolvedModel | None, share: float) -> dict[str, Any]:
        """Write down what should serve; `share` is the challenger's part of the requests."""
        config = with_overrides(self._config, {"serve.challenger_share": share})
        device = "cuda" if config.serve.gpus_per_replica else "cpu"
        write_json_atomic(self._path, painter_arguments(config, champion, device, challenger))
        self._champion, self._challenger, self._share = champion, challenger, share
        # As replicas read it: what they start with must equal what they find.
        self._written = read_wanted(str(self._path)) or {}
        return self._written
