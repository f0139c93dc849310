"""What infra/ says, as plain values, and the questions that more than one test asks of it.

A check takes documents and returns problems, one line each, so that a test can break a document and see it told.
"""

import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import typer
import yaml

from components.errors import InputError
from flows.__main__ import app
from flows.config import load_config

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
KUBERNETES = INFRA / "kubernetes"
SETTINGS = "/etc/fresco/fresco.yaml"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
IMAGES = {f"fresco:{VERSION}", "postgres:17.6", "chrislusf/seaweedfs:4.44"}
"""Ours at this version, and others at versions that exist (SeaweedFS by its git tags)."""

Document = dict[str, Any]


@cache
def load_file(path: Path) -> list[Document]:
    return parse(path.read_text())


def parse(text: str) -> list[Document]:
    return list(yaml.load_all(text, Loader=yaml.CSafeLoader))


def load_all(*without: str) -> list[Document]:
    """Every Kubernetes object in infra/kubernetes, but those of the files named."""
    files = [path for path in sorted(KUBERNETES.glob("*.yaml")) if path.name not in ("kustomization.yaml", *without)]
    return [document for path in files for document in load_file(path)]


def name_of(document: Document) -> str:
    meta = document["metadata"]
    return f"{document['kind']} {meta.get('name') or meta['generateName']}"


def of_kind(documents: list[Document], kind: str) -> list[Document]:
    return [document for document in documents if document["kind"] == kind]


def pods(node: Any, labels: dict[str, str] | None = None) -> Iterator[tuple[dict[str, str], Document]]:
    """Yield (labels, spec) of every pod that a document asks for, however deep."""
    if isinstance(node, dict):
        if "containers" in node:
            yield labels or {}, node
        for key, value in node.items():
            mine = node.get("metadata") or {}
            yield from pods(value, mine.get("labels") if key == "spec" and isinstance(mine, dict) else labels)
    elif isinstance(node, list):
        for item in node:
            yield from pods(item, labels)


def containers(node: Any) -> Iterator[Document]:
    for _, spec in pods(node):
        yield from spec["containers"]


def texts(node: Any) -> Iterator[str]:
    """Yield every string of a document."""
    if isinstance(node, str):
        yield node
    for item in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from texts(item)


@cache
def verbs() -> dict[str, Any]:
    command: Any = typer.main.get_command(app)
    return dict(command.commands)


def fresco_commands(tokens: list[str]) -> Iterator[list[str]]:
    """Yield `VERB ...` of every Fresco call in a command, also behind `ray job submit --` and inside `bash -c`."""
    for place, token in enumerate(tokens):
        if token == "fresco" or token.endswith("/fresco"):
            yield tokens[place + 1 :]
        elif " " in token:
            yield from fresco_commands(shlex.split(token))


def command_problems(tokens: list[str], settings: Path) -> list[str]:
    """Check every Fresco call by the real command line and the real config; `settings` is what SETTINGS stands for."""
    problems = []
    for verb, *options in fresco_commands(tokens):
        if verb.startswith("--"):
            continue
        known = verbs()
        if verb not in known:
            problems.append(f"fresco has no verb {verb!r}")
        else:
            try:
                known[verb].make_context(verb, list(options))
            except typer._click.exceptions.ClickException as error:
                problems.append(f"fresco {verb}: {error.format_message()}")
        if "--config" in options and options[options.index("--config") + 1] != SETTINGS:
            problems.append(f"fresco {verb}: --config expected to be {SETTINGS}, where the settings are mounted")
        overrides = [options[place + 1] for place, option in enumerate(options) if option == "--set"]
        try:
            load_config(str(settings), None, overrides)
        except InputError as error:
            problems.append(f"fresco {verb}: {error}")
    return problems


def image_problems(documents: list[Document]) -> list[str]:
    found = {container["image"] for document in documents for container in containers(document)}
    return [f"image {image} is not one of {sorted(IMAGES)}" for image in sorted(found - IMAGES)]


def addresses(text: str) -> list[tuple[str, int]]:
    """(host, port) of every address that names a service: http://HOST:PORT, scheme://user@HOST:PORT/..."""
    return [(host, int(port)) for host, port in re.findall(r"://(?:[^/@]*@)?([a-z][\w.-]*):(\d+)", text)]
