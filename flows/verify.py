"""fresco verify: is this picture one that an endpoint of this workspace drew, and is it unchanged?

Trusts the public keys in the workspace's `keys` folder, or the one given with --key. The verdict is the answer, not the
exit code: a changed picture is a completed check.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.artifacts import open_workspace
from components.errors import InputError
from components.provenance import verify
from components.signing_key import read_public_key, read_public_keys
from flows.config import Config
from flows.console import say

LARGEST_FILE_BYTES = 200_000_000


def run(config: Config, file: str, key: str | None = None) -> dict[str, Any]:
    """Judge one file; InputError when it cannot be read or is no PNG, JPEG or WebP."""
    path = Path(file).expanduser()
    content = _read(path)
    folder = open_workspace(config.workspace).keys
    keys = read_public_key(Path(key).expanduser()) if key else read_public_keys(folder)
    try:
        verdict = verify(content, keys)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    say(f"{path}: {verdict.status}: {verdict.reason}")
    if verdict.status == "unknown key":
        say(f"trusted are {', '.join(keys) or 'none'} (in {folder}); name the endpoint's public key with --key FILE")
    for name, value in verdict.facts.items():
        say(f"  {name}: {value}")
    return {"file": str(path), "verdict": verdict.status, **{k: v for k, v in asdict(verdict).items() if k != "status"}}


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise InputError(f"expected a picture of at most {LARGEST_FILE_BYTES} bytes, found a larger file: {path}")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"expected a picture at {path}, found: {error.strerror or error}") from error
