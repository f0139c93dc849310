"""The same workspace on S3 as several machines have it: each with a stage of its own, in one process."""

from pathlib import Path

import pytest

from cluster import stage_names
from cluster.artifacts import Workspace, open_workspace


class Machines:
    """`be` makes this process the machine of that name and returns its workspace."""

    def __init__(self, uri: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.uri, self.folder, self._monkeypatch = uri, folder, monkeypatch

    def be(self, name: str) -> Workspace:
        self._monkeypatch.setattr(stage_names, "_folder", self.folder / name)
        self._monkeypatch.setenv("FRESCO_STAGE", str(self.folder / name))  # for verbs that start another process
        return open_workspace(self.uri)
