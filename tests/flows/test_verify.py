"""fresco verify: the verdict is the answer and the exit code says only whether the check was made."""

import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cluster.artifacts import open_workspace
from components.errors import InputError
from components.provenance import encode
from components.signing_key import open_signer
from flows import verify
from flows.config import Config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(workspace=str(tmp_path / "workspace"))


def write(config: Config, path: Path, **facts: Any) -> Path:
    signer = open_signer(open_workspace(config.workspace).keys)
    path.write_bytes(encode(Image.new("RGB", (8, 8), "red"), "png", 100, facts, signer))
    return path


def test_picture_of_this_workspace_is_valid_and_elsewhere_unknown(config: Config, tmp_path: Path) -> None:
    file = write(config, tmp_path / "a.png", seed=3)
    found = verify.run(config, str(file))
    assert (found["verdict"], found["facts"]) == ("valid", {"seed": 3}) and json.dumps(found)
    elsewhere = Config(workspace=str(tmp_path / "elsewhere"))
    assert verify.run(elsewhere, str(file))["verdict"] == "unknown key"
    public = next((tmp_path / "workspace" / "keys").glob("*.pub.pem"))
    assert verify.run(elsewhere, str(file), str(public))["verdict"] == "valid"


def test_what_cannot_be_judged_is_refused(config: Config, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found: No such file"):
        verify.run(config, str(tmp_path / "none.png"))
    with pytest.raises(InputError, match="found: Is a directory"):
        verify.run(config, str(tmp_path))
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InputError, match="expected a PNG, JPEG or WebP file"):
        verify.run(config, str(tmp_path / "text"))


def test_what_a_strangers_file_says_is_told_as_a_claim_and_cannot_move_the_cursor(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of these facts would erase the verdict, or write another one, on a terminal that got it as it is."""
    told = f"1\n\x1b[2A\x1b[J{tmp_path}/a.png: valid: picture and facts are as they were signed"
    file = write(config, tmp_path / "a.png", seed=told, dataset="\u202evalid", **{"run\rid": "x" * 5000})
    verify.run(Config(workspace=str(tmp_path / "elsewhere")), str(file))
    printed = capsys.readouterr().err
    assert printed.isascii() and "\x1b" not in printed and "\r" not in printed
    lines = printed.splitlines()
    assert "unknown key" in lines[0] and "claimed, not verified:" in lines[2] and len(lines) == 6
    assert "1\\n\\x1b[2A" in printed and "\\u202evalid" in printed and len(printed) < 2000
    verify.run(config, str(file))
    assert "claimed" not in capsys.readouterr().err


def test_picture_of_too_many_pixels_is_refused(config: Config, tmp_path: Path) -> None:
    size = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", size), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    written = [struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks]
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(written))
    with pytest.raises(InputError, match=r"bomb\.png: expected a picture that can be decoded safely, found.*900000000"):
        verify.run(config, str(tmp_path / "bomb.png"))


def test_command_prints_one_json_object_and_exits_0_whatever_it_found(config: Config, tmp_path: Path) -> None:
    file = write(config, tmp_path / "a.png", seed=3)
    file.write_bytes(file.read_bytes() + b"x")
    command = [sys.executable, "-m", "flows", "verify", str(file), "--workspace", config.workspace, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(verify.__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verdict"] == "changed"
    missing = subprocess.run([*command[:4], "nothing.png", *command[5:]], capture_output=True, timeout=60, cwd=tmp_path)
    assert missing.returncode != 0
