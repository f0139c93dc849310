"""The key pair that signs what the endpoint draws: made on first use, one private key a folder, public keys beside it.

The private key is readable by its owner only; a file that others can read is refused, as ssh does. Replacing the
private key leaves the old public key in place, so that pictures signed before stay verifiable.
"""

import hashlib
import os
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from components.errors import InputError

PRIVATE_KEY = "provenance.pem"
PUBLIC_SUFFIX = ".pub.pem"
KEY_ID_DIGITS = 16


@dataclass(frozen=True)
class Signer:
    """A private key and the id (16 hex digits) of its public half."""

    key: Ed25519PrivateKey
    key_id: str


def open_signer(folder: Path) -> Signer:
    """Load the private key of `folder`, made there on first use; several processes may come first at once.

    InputError when it is no Ed25519 key or others may read it.
    """
    path = folder / PRIVATE_KEY
    if not path.exists():
        _make_key(path)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        mode = oct(stat.S_IMODE(path.stat().st_mode))[2:]
        raise InputError(f"{path} expected to be readable by its owner only, found mode {mode}; run: chmod 600 {path}")
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError):
        raise InputError(f"{path} expected to hold a private key in PEM form; move it away to have one made") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{path} expected to hold an Ed25519 key, found another kind; move it away to have one made")
    signer = Signer(key, key_id_of(key.public_key()))
    public = folder / f"{signer.key_id}{PUBLIC_SUFFIX}"
    if not public.exists():
        _write_new(public, _public_bytes(key.public_key()), 0o644)
    return signer


def read_public_keys(folder: Path) -> dict[str, Ed25519PublicKey]:
    """Return every public key of a folder by its id; InputError names a file that holds none."""
    return dict(_read_public(path) for path in sorted(folder.glob(f"*{PUBLIC_SUFFIX}")))


def read_public_key(path: Path) -> Mapping[str, Ed25519PublicKey]:
    """Return the public key of one PEM file by its id."""
    return dict([_read_public(path)])


def key_id_of(key: Ed25519PublicKey) -> str:
    raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return hashlib.sha256(raw).hexdigest()[:KEY_ID_DIGITS]


def _read_public(path: Path) -> tuple[str, Ed25519PublicKey]:
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"expected a public key at {path}, found no file") from None
    except (ValueError, TypeError):
        raise InputError(f"{path} expected to hold a public key in PEM form, found something else") from None
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(f"{path} expected to hold an Ed25519 public key, found another kind")
    # By what the key is, never by what the file is called.
    return key_id_of(key), key


def _public_bytes(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _make_key(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    pem = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _write_new(path, pem, 0o600)


def _write_new(path: Path, content: bytes, mode: int) -> None:
    """Write a whole file unless another process was first: linking never replaces."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        Path(temporary).unlink()
