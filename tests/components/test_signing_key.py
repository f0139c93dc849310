"""The key pair: made once, private, shared by processes that start together."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from components.errors import InputError
from components.signing_key import PRIVATE_KEY, open_signer, read_public_key, read_public_keys


def test_key_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    first, second = open_signer(folder), open_signer(folder)
    assert first.key_id == second.key_id and list(read_public_keys(folder)) == [first.key_id]
    assert stat.S_IMODE((folder / PRIVATE_KEY).stat().st_mode) == 0o600
    public = folder / f"{first.key_id}.pub.pem"
    assert b"PRIVATE" not in public.read_bytes() and list(read_public_key(public)) == [first.key_id]
    assert len(list(folder.iterdir())) == 2, "no temporary file is left"


def test_replaced_key_leaves_the_old_public_key_trusted(tmp_path: Path) -> None:
    old = open_signer(tmp_path)
    (tmp_path / PRIVATE_KEY).unlink()
    new = open_signer(tmp_path)
    assert old.key_id != new.key_id and set(read_public_keys(tmp_path)) == {old.key_id, new.key_id}


def test_processes_that_start_together_share_one_key(tmp_path: Path) -> None:
    code = "import sys, pathlib; from components.signing_key import open_signer; "
    code += "print(open_signer(pathlib.Path(sys.argv[1])).key_id)"
    command = [sys.executable, "-c", code, str(tmp_path / "keys")]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert len({child.communicate(timeout=60)[0] for child in children}) == 1


def test_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    open_signer(tmp_path)
    (tmp_path / PRIVATE_KEY).chmod(0o640)
    with pytest.raises(InputError, match="found mode 640; run: chmod 600"):
        open_signer(tmp_path)


def test_file_that_is_no_ed25519_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / PRIVATE_KEY
    other = ec.generate_private_key(ec.SECP256R1())
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    for content in (b"hello", other.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain)):
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(InputError, match=r"expected to hold a"):
            open_signer(tmp_path)
    with pytest.raises(InputError, match="found no file"):
        read_public_key(tmp_path / "none")
    with pytest.raises(InputError, match="found something else"):
        read_public_key(path.with_name(PRIVATE_KEY)) if path.write_bytes(b"x") else None
