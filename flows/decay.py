"""Does the champion do worse on what arrives than on its own test pictures? Its deterministic loss on both.

A sample of the arrivals, chosen by the hash of their bytes, is examined in this process and denoised as the test
pictures were; what was measured is kept by the weights and the pictures, so an unchanged source costs nothing more.
Where a look would cost too much (few arrivals, tables, a large model without a GPU) it says so instead.
"""

import math
import tempfile
from pathlib import Path

import numpy as np

from cluster import stage, storage
from cluster.artifacts import Workspace, write_bytes_atomic
from cluster.registry import Version
from components import examine
from components.arrivals import Arrivals
from components.dataset import TEST, DatasetVersion, Item
from components.errors import InputError
from components.images import Limits
from components.models import load_parts
from components.triggers import Decay
from flows.config import Config
from flows.console import say
from flows.dataset_versions import pixel_store
from flows.drawing import fingerprint_of
from flows.measure import VERSION, denoising_losses, npy_bytes
from flows.models import ResolvedModel, resolve_model
from flows.prepare import SourceFiles

MOST, FEWEST = 64, 20
"""Pictures on either side."""
MOST_PARAMETERS_ON_CPU = 100_000_000
NORMAL_95 = 1.645


def measure_decay(
    config: Config, workspace: Workspace, champion: Version, parent: DatasetVersion, seen: Arrivals
) -> Decay:
    """Compare the losses; RegistryError or InputError where the champion cannot be had."""
    arrived = sorted((one for one in seen.new if one.sha256), key=lambda one: one.sha256)[:MOST]
    tests = parent.split(TEST)[:MOST]
    if min(len(arrived), len(tests)) < FEWEST:
        pictures = f"{len(arrived)} arrivals and {len(tests)} test pictures"
        return Decay(skipped=f"{pictures}, {FEWEST} of each are enough")
    model = resolve_model(config, champion.uri)
    with tempfile.TemporaryDirectory(prefix="fresco-decay-") as folder:
        known = _path(workspace, model, [one.sha256 for one in arrived])
        if not stage.fetch(known):
            too_dear = _too_dear(model)
            if too_dear:
                return Decay(skipped=too_dear)
            base = seen.cursor["source"]
            if arrived[0].files[0].uri == base:
                base = base.rpartition("/")[0]
            files = SourceFiles(base, storage.aws_environment() if storage.is_s3(base) else {})
            limits = Limits(config.data.min_side_px, config.data.max_pixels)
            job = examine.ExamineJob(config.data.source, files, limits, config.data.resolution_px, Path(folder))
            look = examine.make_examiner(job)
            blocks = examine.candidate_blocks([one.candidate for one in arrived])
            found = [one for block in blocks for one in examine.read_found(look(block)) if not one.reason]
            items = [Item(one.sha256, one.caption, TEST, "") for one in {one.sha256: one for one in found}.values()]
            if len(items) < FEWEST:
                return Decay(skipped=f"{len(items)} of {len(arrived)} arrivals can be used, {FEWEST} are enough")
            _keep(known, model, items, Path(folder))
        arrivals_N = np.load(known, allow_pickle=False).mean(axis=1)
    own = _path(workspace, model, [item.sha256 for item in tests])
    if not stage.fetch(own):
        _keep(own, model, tests, pixel_store(config, workspace).directory)
    return compare(np.load(own, allow_pickle=False).mean(axis=1), arrivals_N)


def compare(own_N: np.ndarray, arrivals_M: np.ndarray) -> Decay:
    """Return both means and the lower end of the one-sided 95 % interval of their ratio, less one."""
    own, arrived = float(own_N.mean()), float(arrivals_M.mean())
    spread = math.sqrt(sum(float(x.var(ddof=1)) / len(x) / float(x.mean()) ** 2 for x in (own_N, arrivals_M)))
    low = math.exp(math.log(arrived / own) - NORMAL_95 * spread) - 1
    return Decay(own, arrived, low, len(arrivals_M))


def _too_dear(model: ResolvedModel) -> str:
    import torch

    if torch.cuda.is_available():
        return ""
    parts = load_parts(model.directory, only={"denoiser"})
    count = sum(parameter.numel() for parameter in parts.denoiser.parameters())
    too_many = count > MOST_PARAMETERS_ON_CPU
    return f"a denoiser of {count / 1e6:.0f} M parameters without a GPU costs too much" if too_many else ""


def _keep(path: Path, model: ResolvedModel, items: list[Item], pixels: Path) -> None:
    import torch

    say(f"decay: {len(items)} pictures to denoise with {model.name}")
    parts = load_parts(model.directory, device="cuda" if torch.cuda.is_available() else "cpu")
    losses_NK = denoising_losses(parts, items, pixels)
    if not np.isfinite(losses_NK).all():
        raise InputError(f"expected finite losses of {model.name}, found NaN or infinity; its weights are broken")
    write_bytes_atomic(path, npy_bytes(losses_NK))


def _path(workspace: Workspace, model: ResolvedModel, keys: list[str]) -> Path:
    return workspace.reports / "measured" / f"decay-{fingerprint_of([VERSION, model.fingerprint, keys])}.npy"
