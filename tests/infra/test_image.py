"""What can be said of the container image without building it: what it copies is there, what it installs is pinned."""

import fnmatch
import re
import tomllib
from pathlib import Path

from cluster.session import QUIET_ENVIRONMENT
from tests.infra.manifests import INFRA, PINS, ROOT

TEXT = (INFRA / "image" / "Containerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def instructions(text: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, rest) in order, comments gone and continued lines joined."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    return [(first, rest.strip()) for first, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def all_of(kind: str) -> list[str]:
    return [rest for name, rest in instructions(TEXT) if name == kind]


def sent_to_the_builder(path: Path) -> bool:
    """By .dockerignore: the last line that matches decides."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text().split("\n"):
        pattern = line.removeprefix("!")
        if pattern and not line.startswith("#"):
            name = str(path.relative_to(ROOT))
            deep = pattern.startswith("**/") and Path(name).match(pattern.removeprefix("**/"))
            if deep or fnmatch.fnmatch(name, pattern) or name.startswith(f"{pattern}/"):
                kept = line.startswith("!")
    return kept


def test_instructions_are_those_of_a_container_file() -> None:
    known = {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "ENV", "USER", "CMD"}
    assert {name for name, _ in instructions(TEXT)} <= known
    assert instructions(TEXT)[0] == ("FROM", "python:3.11-slim")
    assert PROJECT["project"]["requires-python"] == ">=3.11,<3.12"


def test_what_is_copied_is_there_and_is_sent_and_is_the_package() -> None:
    copied = [name for line in all_of("COPY") for name in line.split()[:-1]]
    for name in copied:
        assert (ROOT / name).exists() and sent_to_the_builder(ROOT / name), name
    packages = {name.partition(".")[0] for name in PROJECT["tool"]["setuptools"]["packages"]}
    assert packages | {"pyproject.toml", "constraints.txt", PROJECT["project"]["readme"], "LICENSE"} == set(copied)
    for name in (".git/config", "fresco-workspace/journal.jsonl", ".venv/bin/python", "tests/conftest.py"):
        assert not sent_to_the_builder(ROOT / name), name
    assert sent_to_the_builder(ROOT / "components/assets/x") and not sent_to_the_builder(ROOT / "flows/__pycache__")


def test_every_package_is_installed_at_its_pinned_version() -> None:
    installs = [part for line in all_of("RUN") for part in line.split("&&") if " pip install " in part]
    assert len(installs) == 2 and all("-c constraints.txt" in part and "--no-cache-dir" in part for part in installs)
    named = {re.split(r"[\[<>=]", line)[0] for line in PROJECT["project"]["dependencies"]} | {"psycopg2-binary"}
    pinned = {name.lower().replace("_", "-") for name in PINS}
    assert named - pinned == set()
    assert "psycopg2-binary" in installs[0], "the MLflow server's database is PostgreSQL"


def test_ray_nodes_have_the_environment_that_fresco_gives_its_own_ray() -> None:
    [environment] = all_of("ENV")
    assert dict(pair.split("=", 1) for pair in environment.split()) == QUIET_ENVIRONMENT


def test_it_runs_as_the_user_that_the_manifests_name() -> None:
    assert all_of("USER") == ["1000:1000"]
    after = [name for name, _ in instructions(TEXT)]
    assert "RUN" not in after[after.index("USER") :], "nothing is installed by that user, nothing runs as root after it"


def test_packages_of_the_system_leave_nothing_behind() -> None:
    [line] = [line for line in all_of("RUN") if "apt-get" in line]
    assert "--no-install-recommends" in line and line.endswith("rm -rf /var/lib/apt/lists/*")


def test_no_address_of_a_registry_is_written_down() -> None:
    assert not re.search(r"https?://|[\w-]+\.[a-z]{2,}/", TEXT)
