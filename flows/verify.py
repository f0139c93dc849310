"""fresco verify: is this picture one that an endpoint of this workspace drew, and is it unchanged?

Trusts the public keys in the workspace's `keys` folder, or the one given with --key. The verdict is the answer, not the
exit code: a changed picture is a completed check. What a file that is not valid says of itself may come from anybody:
it is told as a claim, and nothing from a file can move the cursor or look like a line of ours.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cluster import stage
from cluster.artifacts import open_workspace
from components.errors import InputError
from components.provenance import verify
from components.signing_key import read_public_key, read_public_keys
from flows.config import Config
from flows.console import say

LARGEST_FILE_BYTES = 200_000_000
MOST_CHARS = 300
"""Of one fact; the real ones are shorter."""


def run(config: Config, file: str, key: str | None = None) -> dict[str, Any]:
    """Judge one file and say what was found; InputError when it cannot be read or is no PNG, JPEG or WebP."""
    found = judge(config, file, key)
    say(f"{plain(found['file'])}: {found['verdict']}: {plain(found['reason'])}")
    if found["verdict"] == "unknown key":
        folder = open_workspace(config.workspace).keys
        trusted = ", ".join(_trusted(config, key)) or "none"
        say(f"trusted are {trusted} (in {folder}); name the endpoint's public key with --key FILE")
    if found["facts"] and found["verdict"] != "valid":
        say("claimed, not verified:")
    for name, value in found["facts"].items():
        say(f"  {plain(name)}: {plain(value)}")
    return found


def judge(config: Config, file: str, key: str | None = None) -> dict[str, Any]:
    """Return what `run` returns, without a word."""
    path = Path(file).expanduser()
    content = _read(path)
    try:
        verdict = verify(content, _trusted(config, key))
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    return {"file": str(path), "verdict": verdict.status, **{k: v for k, v in asdict(verdict).items() if k != "status"}}


def _trusted(config: Config, key: str | None) -> Mapping[str, Ed25519PublicKey]:
    """Public keys by id: the one that was named, else the workspace's."""
    if key:
        return read_public_key(Path(key).expanduser())
    folder = open_workspace(config.workspace).keys
    stage.fetch_tree(folder)
    return read_public_keys(folder)


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise InputError(f"expected a picture of at most {LARGEST_FILE_BYTES} bytes, found a larger file: {path}")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"expected a picture at {path}, found: {error.strerror or error}") from error


def plain(value: object) -> str:
    """Return a text of one line, with what a terminal would obey, and what would turn its direction, spelled out."""
    text = str(value)
    shown = text[:MOST_CHARS] + ("..." if len(text) > MOST_CHARS else "")
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in shown)
