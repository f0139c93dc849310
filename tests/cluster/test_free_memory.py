"""Free memory: the tightest control group above the process decides, in both versions; without one the machine's."""

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from cluster.free_memory import free_bytes, free_host_bytes, memory_turn

MIB = 2**20


def group(folder: Path, names: tuple[str, str], limit: object, used: int, stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(stat)


V2 = ("memory.max", "memory.current")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def own(tmp_path: Path, text: str) -> Path:
    (tmp_path / "cgroup").write_text(text)
    return tmp_path / "cgroup"


def test_tightest_of_the_groups_above_the_process_decides_and_pages_of_files_are_free(tmp_path: Path) -> None:
    root = tmp_path / "sys"
    group(root, V2, "max", 900 * MIB, "anon 1\n")
    group(root / "pod", V2, 10 * MIB, 8 * MIB, f"anon 5\ninactive_file {MIB}\n")
    group(root / "pod" / "box", V2, 6 * MIB, MIB, "inactive_file 0\n")
    assert free_host_bytes(root, own(tmp_path, "0::/pod/box\n")) == 3 * MIB
    assert free_host_bytes(root, own(tmp_path, "0::/other\n")) > 100 * MIB, "not a group of this process"


def test_group_that_is_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    group(tmp_path / "sys", V2, MIB, 2 * MIB, "")
    assert free_host_bytes(tmp_path / "sys", own(tmp_path, "0::/\n")) == 0


def test_first_version_of_groups_is_read_in_the_folder_of_the_memory_controller(tmp_path: Path) -> None:
    root = tmp_path / "sys"
    group(root / "memory" / "box", V1, 5 * MIB, 3 * MIB, f"total_inactive_file {MIB}\n")
    assert free_host_bytes(root, own(tmp_path, "3:cpu,cpuacct:/other\n2:memory:/box\n")) == 3 * MIB


def test_without_groups_it_is_the_machines(tmp_path: Path) -> None:
    found = free_host_bytes(tmp_path / "none", tmp_path / "none")
    assert 0 < found <= psutil.virtual_memory().total
    assert 0 < free_bytes("cpu") <= psutil.virtual_memory().total


def test_gpu_is_asked_itself() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU on this machine")
    held = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    before = free_bytes("cuda")
    del held
    assert free_bytes("cuda") >= before + 64 * MIB, "what torch keeps for itself can be taken again"


HOLDER = """
import sys, time
from pathlib import Path
from cluster.free_memory import memory_turn

with memory_turn(Path(sys.argv[1]), "cpu", 0):
    print("held", flush=True)
    time.sleep(600)
"""


def test_turn_of_another_process_is_waited_for_and_ends_with_it(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(TimeoutError, match="another replica loads a model"), memory_turn(tmp_path, "cpu", 0.1):
            pytest.fail("two at a time")
        with memory_turn(tmp_path, "cpu", 0.1, alone=False):
            pass  # who starts is wanted more than it is safe
        with memory_turn(tmp_path, "cuda", 0):
            pass  # another memory
        os.kill(holder.pid, signal.SIGKILL)
        with memory_turn(tmp_path, "cpu", 60):
            pass


def test_those_that_start_share_a_turn_and_keep_away_who_would_be_alone(tmp_path: Path) -> None:
    with ExitStack() as starting:
        for _ in range(2):
            starting.enter_context(memory_turn(tmp_path, "cpu", 0, alone=False))
        with pytest.raises(TimeoutError), memory_turn(tmp_path, "cpu", 0):
            pytest.fail("others take memory")
    with memory_turn(tmp_path, "cpu", 0):
        pass


def test_without_a_folder_to_write_in_nobody_waits(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (None, tmp_path / "file"):
        with memory_turn(folder, "cpu", 0), memory_turn(folder, "cpu", 0):
            pass
