"""Which address on S3 does a path have, and which path an address, where a workspace on S3 has its stage here?

The bucket and prefix are spelled in the name of the stage's folder, so a path alone tells its address, in any process
and on any machine. Paths of local workspaces have none, and neither has what belongs to a machine and not to the
workspace (LOCAL). Nothing here reads or writes.
"""

import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from cluster import s3, storage
from cluster.errors import PlacementError
from cluster.redaction import redacted

FOLDER = "fresco-stage"
ROOT_PREFIX = "s3@"
NAME_LIMIT_BYTES = 240
"""Of a folder's name; disks allow 255."""
SEEN = ".seen"
"""Folder of the stage that remembers which version of an object a local file is."""
LOCAL = frozenset({"serving", "pictures", "mlartifacts"})
RAYS, PRIVATE_KEY = "ray", "provenance.pem"
"""What is this machine's: logs and files of a running endpoint, Ray's own, and the private key that signs pictures."""
_folder = Path(os.environ.get("FRESCO_STAGE") or "~/.cache/fresco")


def root_of(uri: str) -> Path:
    """Return the stage of s3://bucket/prefix; PlacementError for a prefix too long for a folder's name."""
    bucket, _, prefix = uri.removeprefix(storage.S3_SCHEME).strip("/").partition("/")
    name = ROOT_PREFIX + _spelled(bucket) + (f"+{_spelled(prefix)}" if prefix else "")
    if not bucket or ".." in prefix.split("/") or "//" in prefix or len(name) > NAME_LIMIT_BYTES:
        raise PlacementError(
            f"workspace expected as s3://BUCKET/PREFIX with a prefix of at most {NAME_LIMIT_BYTES - 70} plain letters,"
            f" found {redacted(uri)!r}; choose another prefix"
        )
    with s3.worded("open", uri):
        # Buckets of different servers may share a name.
        server = s3.client().meta.endpoint_url.partition("://")[2]
    return _folder.expanduser().resolve() / FOLDER / _spelled(server).replace("+", "=2F") / name


def uri_of(root: Path) -> str:
    """Return the address of a workspace by its root: s3://bucket/prefix for a stage, else the path."""
    return root_address(root) or str(root)


def address_of(path: Path) -> str | None:
    """Return the S3 address of a path below a stage; None for a path of a local workspace, and for what is LOCAL."""
    found = split(path)
    if found is None or _is_local(found[1]):
        return None
    return storage.join(_address(found[0]), *found[1])


def root_address(path: Path) -> str | None:
    """Return the S3 address of the workspace whose stage a path is or lies in; None for a local workspace."""
    found = split(path)
    return None if found is None else _address(found[0])


def shared(place: str | Path) -> str:
    """Return where a lease or a fenced file is: never in a stage, which other machines do not see."""
    text = str(place)
    return text if storage.is_s3(text) else address_of(Path(text)) or text


def portable(content: Any, inside: Path) -> Any:
    """Return JSON content as another machine can read it: paths in the stage that `inside` is in become addresses."""
    found = split(inside)
    if found is None:
        return content
    if isinstance(content, dict):
        return {portable(key, inside): portable(value, inside) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [portable(value, inside) for value in content]
    if isinstance(content, str) and content.startswith(f"{found[0]}/"):
        return storage.join(_address(found[0]), content.removeprefix(f"{found[0]}/"))
    return content


def here(text: str, root: Path) -> str:
    """Return an address inside the workspace as a path of its stage here; any other text as it is."""
    address = root_address(root)
    if address is None or not text.startswith(f"{address}/"):
        return text
    return str(root.joinpath(*text.removeprefix(f"{address}/").rstrip("/").split("/")))


def split(path: Path) -> tuple[Path, tuple[str, ...]] | None:
    """Return the stage that a path is in, and the path's parts inside."""
    parts = path.parts
    for place, part in enumerate(parts[:-2]):
        if part == FOLDER and parts[place + 2].startswith(ROOT_PREFIX):
            return Path(*parts[: place + 3]), parts[place + 3 :]
    return None


def _is_local(parts: tuple[str, ...]) -> bool:
    """Whether what lies there in a stage stays on this machine; models may be called as these folders are."""
    of_ray = parts[:1] in (("runs",), ("searches",)) and RAYS in parts[2:]
    return bool(parts) and (parts[0] in (SEEN, *LOCAL) or parts[-1] == PRIVATE_KEY or of_ray)


def _address(root: Path) -> str:
    return storage.S3_SCHEME + unquote(root.name.removeprefix(ROOT_PREFIX).replace("+", "/").replace("=", "%"))


def _spelled(text: str) -> str:
    """Write a text with letters that no file system minds: "/" as "+", others as =XX."""
    plain = [
        letter
        if letter.isascii() and (letter.isalnum() or letter in "-_.")
        else "+"
        if letter == "/"
        else "".join(f"={byte:02X}" for byte in letter.encode())
        for letter in text
    ]
    return "".join(plain)
