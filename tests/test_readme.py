"""The README's client script does what the README says, as it is printed, against the embedded base."""

import subprocess
import sys
from pathlib import Path

from PIL import Image

from cluster.placement import ServeSection
from components.models import embedded_base
from tests.endpoint import endpoint

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = """.venv/bin/python - "$URL" <<'EOF'\n""", "\nEOF\n"


def test_client_script_generates_streams_edits_and_meets_an_error(tmp_path: Path) -> None:
    script = README.read_text().split(BEGIN)[1].split(END)[0]
    with endpoint(embedded_base(), tmp_path / "workspace", ServeSection(), resolution_px=64) as served:
        command = [sys.executable, "-", served.url]
        done = subprocess.run(command, input=script, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = ["star-0.png", "star-1.png", *(f"star-partial_image{index}.png" for index in range(3))]
    files += ["star-completed.png", "star-edited.png"]
    *saved, error = done.stdout.splitlines()
    # Early pictures are dropped when the decoder is busy, and the edit's last line is the refusal.
    assert set(saved) <= set(files) and {"star-0.png", "star-completed.png", "star-edited.png"} <= set(saved)
    assert error.startswith("invalid_value size size expected to be auto or WIDTHxHEIGHT")
    with Image.open(tmp_path / "star-0.png") as star, Image.open(tmp_path / "star-edited.png") as edited:
        right = (32, 0, 64, 64)
        assert star.crop(right).tobytes() == edited.crop(right).tobytes()
