"""Which model versions exist, what made each, and where the aliases point: MLflow's registry through its client only.

A version is a pointer to a diffusers directory in the workspace plus tags for its lineage; weights are never copied or
pickled into MLflow. How aliases move, safely and with a history, is in `champion.py`.
"""

import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote

from cluster import stage
from cluster.artifacts import Workspace
from cluster.errors import RegistryError, TrackingError, reason_of
from cluster.lease import hold_lease
from cluster.whole_folders import fetch_whole

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

CHAMPION = "champion"
PREVIOUS = "previous"
CHALLENGER = "challenger"

TAG_RUN = "fresco.run_id"
TAG_DATASET = "fresco.dataset"
TAG_FINGERPRINT = "fresco.fingerprint"
TAG_BASE = "fresco.base"
TAG_COMMIT = "fresco.commit"
TAG_MODEL_FINGERPRINT = "fresco.model_fingerprint"
TAG_PARENT = "fresco.parent"
TAG_PATH = "fresco.path"
"""Path of the pipeline inside the workspace, so that a moved workspace still finds it."""
TAG_SINCE = "fresco.champion_since"
TAG_DECISION = "fresco.decision"
TAG_SCORECARD = "fresco.scorecard"
TAG_ENCODER = "fresco.encoder"
TAG_RETIRED = "fresco.retired"

SOURCE_SCHEME = "fresco://"
"""A tracking server refuses sources that are local paths outside its own artifacts; ours is only a note for people."""

ATTEMPTS = 3
RETRY_AFTER_S = 0.5
NO_SUCH = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
BUSY = "TEMPORARILY_UNAVAILABLE"
NOT_ASKED = (BUSY, "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED")
NO_ANSWER = "INTERNAL_ERROR"

T = TypeVar("T")


@dataclass(frozen=True)
class Version:
    """One registered model version; `source` is the directory it pointed to when it was registered."""

    name: str
    number: int
    source: str
    created: float
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.number}"


@dataclass(frozen=True)
class Registry:
    """A handle on one registry; it opens the store on first use and holds no global MLflow state.

    Every method raises TrackingError where the store could not be asked: what was wanted may be had in a moment.
    """

    workspace: Workspace
    tracking_uri: str = ""

    @property
    def uri(self) -> str:
        return self.tracking_uri or self.workspace.mlflow_uri

    def by_alias(self, name: str, alias: str) -> Version | None:
        """Return the version an alias points to, None when there is no such model or alias."""
        if self._empty:
            return None
        found = self._look(lambda: self._client.get_model_version_by_alias(name, alias))
        return None if found is None else _version(found)

    def by_number(self, name: str, number: int) -> Version:
        """Return one version; RegistryError lists the numbers that exist."""
        if not self._empty:
            found = self._look(lambda: self._client.get_model_version(name, str(number)))
            if found is not None:
                return _version(found)
        have = ", ".join(str(version.number) for version in self.versions(name)) or "none"
        raise RegistryError(
            f"models:/{name}/{number} expected in the registry {self.uri}, found versions: {have}; promote a run first"
            " (fresco promote RUN_ID)"
        )

    def versions(self, name: str) -> list[Version]:
        """Return every version of a model, oldest first."""
        if self._empty:
            return []
        query = "name='" + name.replace("'", "\\'") + "'"
        found, token = [], None
        while True:
            page = self._call(partial(self._client.search_model_versions, query, page_token=token))
            found += [_version(entry) for entry in page]
            token = page.token
            if not token:
                return sorted(found, key=lambda version: version.number)

    def register(
        self, name: str, pipeline_dir: Path, tags: Mapping[str, str], mlflow_run_id: str | None = None
    ) -> Version:
        """Make a version that points to `pipeline_dir`; the version with the same run and weights is returned instead.

        `tags` must hold the model's fingerprint (TAG_MODEL_FINGERPRINT): that is how the same model is recognised.
        """
        with hold_lease(self.lock_path(name), f"register {pipeline_dir.name}"):
            self._call(lambda: self._make_model(name))
            same = self._same_model(name, tags)
            if same is None:
                self._call(
                    lambda: self._client.create_model_version(
                        name,
                        SOURCE_SCHEME + quote(stage.portable(str(pipeline_dir.resolve()), self.workspace.root)),
                        run_id=mlflow_run_id,
                        tags={**tags, **self._path_tag(pipeline_dir)},
                        await_creation_for=0,
                    )
                )
                # Not the one that came back: MLflow's client sends a request again whose answer was lost, which makes
                # another version, and every later call has to find the same one.
                same = self._same_model(name, tags)
        if same is None:
            raise RegistryError(
                f"{name} expected a version of run {tags.get(TAG_RUN)} just made, found none; try again"
            )
        return same

    def _same_model(self, name: str, tags: Mapping[str, str]) -> Version | None:
        """The first version with this run and these weights."""
        keys = (TAG_RUN, TAG_MODEL_FINGERPRINT)
        found = (one for one in self.versions(name) if all(one.tags.get(key) == tags.get(key) for key in keys))
        return next(found, None)

    def tag(self, version: Version, tags: Mapping[str, str]) -> None:
        """Add tags to a version; a text longer than MLflow keeps is cut."""
        for key, text in tags.items():
            self._call(partial(self._client.set_model_version_tag, version.name, str(version.number), key, text[:5000]))

    def set_alias(self, name: str, alias: str, number: int | None) -> None:
        """Point an alias to a version, or remove it for None, and read it again; only under `lock_path`."""
        before = self.by_alias(name, alias)
        if number is not None:
            self._call(lambda: self._client.set_registered_model_alias(name, alias, str(number)))
        elif before is not None:
            self._call(lambda: self._client.delete_registered_model_alias(name, alias))
        after = self.by_alias(name, alias)
        found = after.number if after else None
        if found != number:
            raise RegistryError(
                f"alias {alias} of {name} expected to be {number or 'gone'} after the write, found {found or 'none'}:"
                f" somebody else moves aliases in {self.uri}; end that and run the command again"
            )

    def directory_of(self, version: Version) -> Path:
        """Return the pipeline directory of a version; RegistryError when it is gone."""
        inside = version.tags.get(TAG_PATH)
        tried = [self.workspace.root / inside] if inside else []
        tried.append(Path(stage.here(version.source, self.workspace.root)))
        for directory in tried:
            if fetch_whole(directory):
                return directory
        raise RegistryError(
            f"{version.uri} expected its pipeline in {' or '.join(map(str, tried))}, found nothing there: the directory"
            " was deleted or moved; put it back or promote another run"
        )

    @cached_property
    def _client(self) -> "MlflowClient":
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        from mlflow import MlflowClient

        # It logs every migration of a new database, and each failed statement with a traceback that we raise anyway.
        for noisy in ("alembic", "mlflow.store.db.utils"):
            logging.getLogger(noisy).setLevel(logging.CRITICAL)
        return MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)

    @property
    def _empty(self) -> bool:
        """Looking into a registry that nobody wrote to yet must not create a database."""
        return not self.tracking_uri and not (self.workspace.root / "mlflow.db").exists()

    def lock_path(self, name: str) -> str:
        """The lease under which the aliases of a model move."""
        return self.workspace.place("locks", f"aliases-{name}.lock")

    def _path_tag(self, directory: Path) -> dict[str, str]:
        inside = directory.resolve().is_relative_to(self.workspace.root)
        return {TAG_PATH: str(directory.resolve().relative_to(self.workspace.root))} if inside else {}

    def _make_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _look(self, read: Callable[[], T]) -> T | None:
        """Run a read whose 'there is none' is an answer."""
        from mlflow.exceptions import MlflowException

        def none_if_absent() -> T | None:
            try:
                return read()
            except MlflowException as error:
                if error.error_code in NO_SUCH:
                    return None
                raise

        return self._call(none_if_absent)

    def _call(self, action: Callable[[], T]) -> T:
        """Run one client call; a busy store is tried again a few times.

        TrackingError where the store could not be asked, RegistryError where it refused.
        """
        from mlflow.exceptions import MlflowException

        for attempt in range(1, ATTEMPTS + 1):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)  # the store's own queries, not ours
                    return action()
            except MlflowException as error:
                if error.error_code == BUSY and attempt < ATTEMPTS:
                    logging.getLogger(__name__).warning("registry %s is busy (attempt %d)", self.uri, attempt)
                    time.sleep(RETRY_AFTER_S * attempt)
                    continue
                raise (TrackingError if self._not_asked(error) else RegistryError)(
                    f"model registry expected to answer at {self.uri}, found: {reason_of(error)}; check"
                    " placement.tracking_uri and the free space of the workspace"
                ) from error
        raise AssertionError("unreachable")

    def _not_asked(self, error: "MlflowException") -> bool:
        """Whether a failed call says nothing about what was asked, only that nobody could answer."""
        from mlflow.exceptions import RestException

        if error.error_code == NO_ANSWER:
            # What MLflow's client makes of a broken connection, a timeout and, after its own tries, any 5xx or 429; an
            # answer in MLflow's own form is another matter, and so is an internal error of the embedded store.
            return self.uri.startswith("http") and not isinstance(error, RestException)
        return error.error_code in NOT_ASKED


def _version(entry: Any) -> Version:
    source = str(entry.source)
    if source.startswith(SOURCE_SCHEME):
        source = unquote(source.removeprefix(SOURCE_SCHEME))
    return Version(entry.name, int(entry.version), source, entry.creation_timestamp / 1000, dict(entry.tags or {}))
