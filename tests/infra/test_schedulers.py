"""The examples for other schedulers call Fresco as it is: crontab, systemd and Airflow."""

import ast
import configparser
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.infra.manifests import INFRA, command_problems

SCHEDULERS = INFRA / "schedulers"
UNITS = sorted(SCHEDULERS.glob("*.service")) + sorted(SCHEDULERS.glob("*.timer"))
DAG = (SCHEDULERS / "airflow_dag.py").read_text()
SECTIONS = {
    "Unit": {"Description", "Wants", "After"},
    "Service": {
        "Type", "User", "ExecStart", "EnvironmentFile", "Restart", "RestartSec", "RestartPreventExitStatus",
        "TimeoutStopSec", "KillMode", "NoNewPrivileges", "ProtectSystem", "ProtectHome", "ReadWritePaths",
    },
    "Timer": {"OnCalendar", "Persistent", "RandomizedDelaySec"},
    "Install": {"WantedBy"},
}  # fmt: skip
OPERATOR = {
    "airflow.providers.standard.operators.bash": {"BashOperator"},
    "airflow.sdk": {"DAG"},
    "datetime": {"datetime", "timedelta"},
}
ARGUMENTS = {
    # Airflow 3's documentation of DAG, of the operators' base class, and of BashOperator.
    "DAG": {"dag_id", "schedule", "start_date", "catchup", "max_active_runs", "tags"},
    "BashOperator": {"task_id", "bash_command", "append_env", "retries", "retry_delay", "execution_timeout"},
}


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "fresco.yaml"
    path.write_text("name: fresco\n")
    return path


def unit(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=True, interpolation=None, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(path.read_text())
    return parser


def test_crontab_line_has_a_time_a_user_and_a_command_of_fresco(settings: Path) -> None:
    lines = [line for line in (SCHEDULERS / "crontab").read_text().splitlines() if line and line[0] not in "#M"]
    [(*when, user, program)] = [line.split(maxsplit=6)[:7] for line in lines]
    assert all(re.fullmatch(r"[\d*/,-]+", field) for field in when) and len(when) == 5 and user == "fresco"
    assert "%" not in program, "cron reads it as the end of the command"
    assert shlex.split(program)[1:3] == ["retrain", "--once"]
    assert command_problems(shlex.split(program), settings) == []


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_unit_has_known_settings_and_a_command_of_fresco(path: Path, settings: Path) -> None:
    told = unit(path)
    for section in told.sections():
        assert set(told[section]) <= SECTIONS[section], section
    assert told["Unit"]["Description"].startswith("Fresco")
    if path.suffix == ".service":
        command = shlex.split(told["Service"]["ExecStart"])
        assert command[1] == "retrain" and command_problems(command, settings) == []
    else:
        assert path.with_suffix(".service").is_file() and told["Install"]["WantedBy"] == "timers.target"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_finds_nothing_wrong_but_that_fresco_is_not_installed_there(tmp_path: Path) -> None:
    for path in UNITS:
        (tmp_path / path.name).write_text(path.read_text().replace("/opt/fresco/.venv/bin/fresco", "/bin/true"))
    command = ["systemd-analyze", "verify", *(str(tmp_path / path.name) for path in UNITS)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert not [line for line in told.stderr.splitlines() if "fresco" in line], told.stderr


def test_dag_uses_documented_names_and_a_command_of_fresco(settings: Path) -> None:
    tree = ast.parse(DAG)
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Import)
        if isinstance(node, ast.ImportFrom):
            assert {alias.name for alias in node.names} <= OPERATOR[node.module or ""]
    calls = {ast.unparse(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    given = {
        name: {
            key.arg: ast.literal_eval(key.value) for key in calls[name].keywords if isinstance(key.value, ast.Constant)
        }
        for name in ARGUMENTS
    }
    for name, allowed in ARGUMENTS.items():
        assert {key.arg for key in calls[name].keywords} <= allowed and not calls[name].args
    assert given["DAG"]["catchup"] is False and given["DAG"]["max_active_runs"] == 1
    command = shlex.split(given["BashOperator"]["bash_command"])
    assert command[1:3] == ["retrain", "--once"] and command_problems(command, settings) == []


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("/opt/fresco/.venv/bin/fresco retrian --once", "no verb 'retrian'"),
        ("fresco train --conf /etc/fresco/fresco.yaml", "No such option"),
        ("fresco train --config /etc/fresco.yaml", "--config expected to be"),
        ("bash -c 'ray start && exec fresco train --set train.stps=1'", "'train.stps' is unknown"),
        ("ray job submit -- fresco promote", "Missing argument"),
    ],
)
def test_wrong_command_is_found(command: str, told: str, settings: Path) -> None:
    assert told in "\n".join(command_problems(shlex.split(command), settings))
