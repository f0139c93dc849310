"""How does a folder that is whole or not there (a pipeline, a packed table) stay so on S3?

Its files are uploaded first and then, last, `<folder>.whole.json` with their names, sizes and SHA-256. Only what that
list says is fetched, into a folder beside, which is renamed when every file agrees. A folder that was replaced has
another list, so an old copy is never taken for the new one.
"""

import fcntl
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster import s3, s3_files, stage, storage
from cluster.errors import StorageError

WHOLE = ".whole.json"
FOR_PEOPLE = (".md", ".png")
"""A model's card is written when its folder is whole already, and again later: it is a file by itself."""


def keep_whole(folder: Path) -> None:
    """Bring a finished folder of a stage to S3; one that is there already, as it is here, is left alone."""
    if stage.address_of(folder) is None:
        return
    listed = {name: _facts(folder / name) for name in _names(folder)}
    content = (json.dumps({"files": listed}, indent=2, sort_keys=True) + "\n").encode()
    there = _read_list(folder)
    if there != content:
        before = _parsed(folder, there) if there is not None else {}
        if any(listed.get(name) != facts for name, facts in before.items()):
            stage.remove(_list(folder))  # from here on there is no whole folder, until there is the new one
        new = [folder / name for name, facts in listed.items() if before.get(name) != facts]
        with ThreadPoolExecutor(stage.AT_ONCE, thread_name_prefix="keep") as pool:
            list(pool.map(stage.keep_anew, new))
        stage.write(_list(folder), content)
    _note(folder).write_bytes(content)


def fetch_whole(folder: Path) -> bool:
    """Have a whole folder here as S3 has it; False when there is none. One of a local workspace is or is not there."""
    if stage.address_of(folder) is None:
        return folder.is_dir()
    content = _read_list(folder)
    if content is None:
        return False
    listed = _parsed(folder, content)
    if _is_here(folder, content, listed):
        return True
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(folder):
        if not _is_here(folder, content, listed):
            _replace(folder, content, listed)
    return True


def remove_whole(folder: Path) -> None:
    """Remove a folder everywhere, its list first: a half-removed one is no folder."""
    stage.remove(_list(folder))
    stage.remove_tree(folder)


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let the workers of one machine wait for the first of them; the system frees the lock of one that dies."""
    with folder.with_name(f".{folder.name}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _replace(folder: Path, content: bytes, listed: dict[str, Any]) -> None:
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        with ThreadPoolExecutor(stage.AT_ONCE, thread_name_prefix="fetch") as pool:
            list(pool.map(lambda name: _fetch(folder, temporary, name, listed[name]), listed))
        temporary.chmod(0o755)
        _place(temporary, folder)
        _note(folder).write_bytes(content)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_here(folder: Path, content: bytes, listed: dict[str, Any]) -> bool:
    """Whether the local copy was made by this list, and nobody removed a file of it since."""
    if not (_note(folder).is_file() and _note(folder).read_bytes() == content):
        return False
    paths = {folder / name: facts["size"] for name, facts in listed.items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def _fetch(folder: Path, temporary: Path, name: str, facts: dict[str, Any]) -> None:
    address = f"{stage.address_of(folder)}/{name}"
    bucket, _, key = address.removeprefix(storage.S3_SCHEME).partition("/")
    with s3.worded("fetch", address):
        found = s3_files.download(bucket, key, temporary / name)
    if found is None or _facts(temporary / name) != facts:
        raise StorageError(
            f"{address} expected {facts['size']} bytes with SHA-256 {facts['sha256'][:12]}..., found"
            f" {'another content' if found else 'nothing'}: it was changed after it was stored, or is just being"
            " replaced; run the command again, and if it stays so, restore the file"
        )


def _place(temporary: Path, folder: Path) -> None:
    """Put the new folder in the old one's place; who is a moment later finds it there."""
    old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        if folder.is_dir():
            folder.rename(old / folder.name)
        temporary.rename(folder)
    except OSError as error:
        if not folder.is_dir():
            raise StorageError(f"could not place {folder}: {error}; run the command again") from error
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _parsed(folder: Path, content: bytes) -> dict[str, Any]:
    try:
        listed: dict[str, Any] = json.loads(content)["files"]
    except (ValueError, TypeError, KeyError) as error:
        raise StorageError(
            f"{stage.address_of(_list(folder))} expected to list a folder's files, found: {error}; restore or remove it"
        ) from error
    if any(".." in Path(name).parts or Path(name).is_absolute() for name in listed):
        raise StorageError(f"{stage.address_of(_list(folder))} expected names inside the folder; nothing was read")
    return listed


def _names(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in FOR_PEOPLE)
    found = (path.relative_to(folder) for path in files)
    return sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))


def _facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _read_list(folder: Path) -> bytes | None:
    try:
        return storage.read_bytes(str(stage.address_of(_list(folder))))
    except FileNotFoundError:
        return None


def _list(folder: Path) -> Path:
    return folder.with_name(folder.name + WHOLE)


def _note(folder: Path) -> Path:
    """The list by which the local copy was made."""
    return folder.with_name(f".{folder.name}{WHOLE}")
