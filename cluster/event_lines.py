"""How does an append-only file live on S3, where nothing can be appended to?

As one object for each line, NUMBER.json below `<file>.lines/`. The next number is created if nobody else has (exactly
one can), so no line is lost or doubled whoever writes at the same time, and a line that was begun after another was
there always gets a higher number: the order needs no clock.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cluster import s3, stage, storage

DIGITS = 12
AT_ONCE = 16
_newest: dict[str, int] = {}
"""The highest number that this process has seen below an address; the search for the next one begins there."""


def append(path: Path, content: bytes) -> None:
    """Append one line (JSON) to the file that a path of a stage stands for."""
    folder = _folder(path)
    number = _highest(folder)
    while not storage.put_if_absent(_object(folder, number + 1), content):
        # Another was faster; at least one number on, also where a listing should be behind.
        number = max(number + 1, _highest(folder))
    _newest[folder] = number + 1


def read(path: Path) -> list[dict[str, Any]]:
    """Return every line in order; each is fetched once and kept in the stage, as long as its object is the same."""
    folder, kept = _folder(path), _cache(path)
    known: dict[str, Any] = _load(kept)
    entries = [entry for entry in storage.iter_files(folder) if entry.uri.endswith(".json")]
    new = [entry for entry in entries if known.get(_name(entry.uri), [""])[0] != entry.etag]
    if new:
        with ThreadPoolExecutor(min(AT_ONCE, len(new)), thread_name_prefix="lines") as pool:
            contents = list(pool.map(lambda entry: storage.read_bytes(entry.uri), new))
        known |= {
            _name(entry.uri): [entry.etag, json.loads(content)] for entry, content in zip(new, contents, strict=True)
        }
        storage.write_bytes_atomic(str(kept), json.dumps(known, ensure_ascii=False).encode())
    return [known[_name(entry.uri)][1] for entry in entries]


def exists(path: Path) -> bool:
    """Say whether the file has a line."""
    return storage.exists(_folder(path))


def _highest(folder: str) -> int:
    """Return the highest number there is, at least what this process has seen."""
    bucket, _, prefix = folder.removeprefix(storage.S3_SCHEME).partition("/")
    seen = _newest.get(folder, 0)
    after = {"StartAfter": f"{prefix}/{seen:0{DIGITS}}.json"} if seen else {}
    with s3.worded("list", folder):
        for item in s3.pages(bucket, f"{prefix}/", **after):
            name = _name(item["Key"]).removesuffix(".json")
            seen = max(seen, int(name)) if name.isdecimal() else seen
    _newest[folder] = seen
    return seen


def _folder(path: Path) -> str:
    address = stage.address_of(path)
    assert address is not None, f"{path} is no file of a stage"
    return address + stage.LINES


def _object(folder: str, number: int) -> str:
    return f"{folder}/{number:0{DIGITS}}.json"


def _name(uri: str) -> str:
    return uri.rpartition("/")[2]


def _cache(path: Path) -> Path:
    return path.with_name(f".{path.name}.fetched")


def _load(kept: Path) -> dict[str, Any]:
    try:
        known: dict[str, Any] = json.loads(kept.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return known
