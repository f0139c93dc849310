"""The rehearsal on a real replica: what it measures, what it finds, and that nothing of it stays."""

import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from cluster.artifacts import open_workspace
from cluster.serving import replica_memory_bytes
from components.models import make_tiny, save_parts
from components.policy import check_served
from flows.config import Config
from flows.models import resolve_model
from flows.rehearse import APPLICATION, PROMPTS, largest_difference, rehearse

# Slow: a replica of its own for each model.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.")]


class WatchFolder:
    """Notes every file that appears below a folder, however short its life."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.names = folder, set[str]()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> set[str]:
        self._closing.set()
        self._thread.join()
        return self.names

    def _run(self) -> None:
        while not self._closing.wait(0.1):
            self.names |= {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()}


def test_sound_model_answers_with_the_samplers_pictures_and_leaves_nothing_behind(
    config: Config, make_run, ray_session: None
) -> None:
    make_run("fresco-aaa", 0)
    root = open_workspace(config.workspace).root
    seen = WatchFolder(root / "serving")
    served = rehearse(config, resolve_model(config, "fresco-aaa"))
    assert served.problem == "" and served.pictures == len(PROMPTS)
    assert served.largest_difference <= 1 and served.memory_bytes > 50 * 2**20
    assert 0 < served.answer_s < served.ready_s
    assert check_served(served, config.gate).outcome == "pass"
    assert replica_memory_bytes(APPLICATION) == 0
    names = seen.close()
    # An endpoint that runs merges serving/fresco/metrics: nothing of a rehearsal may be there, then or later.
    assert any(name.startswith(f"{APPLICATION}/metrics/") for name in names), names
    # Beside the files of its own application only the lock by which replicas take turns at memory.
    assert all(name.startswith((APPLICATION, "memory-")) for name in names), names
    assert [path.name for path in root.glob("serving/*") if not path.name.startswith("memory-")] == []


def test_model_that_draws_nothing_finite_is_told_with_its_own_words(
    config: Config, tmp_path: Path, ray_session: None
) -> None:
    parts = make_tiny("stable_diffusion", seed=0)
    with torch.no_grad():
        parts.denoiser.conv_out.bias.fill_(float("nan"))
    save_parts(parts, tmp_path / "broken")
    served = rehearse(config, resolve_model(config, str(tmp_path / "broken")))
    assert "NonFiniteError: expected finite" in served.problem
    assert check_served(served, config.gate).outcome == "fail"


def test_largest_difference_is_in_levels_and_total_for_other_sizes() -> None:
    black, grey = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), (0, 3, 1))
    assert (largest_difference(black, black), largest_difference(black, grey)) == (0, 3)
    assert largest_difference(black, Image.new("RGB", (9, 8))) == 255
