"""How a command names itself in the advice it gives."""

import sys
from pathlib import Path

import pytest

from flows.console import program


def test_program_is_called_by_path_unless_the_shell_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "bin" / "fresco"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), "train"])
    monkeypatch.setenv("PATH", "/usr/bin")
    assert program() == "bin/fresco"
    monkeypatch.setenv("PATH", str(script.parent))
    assert program() == "fresco"


def test_program_has_its_name_when_it_runs_inside_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/pytest"])
    assert program() == "fresco"
