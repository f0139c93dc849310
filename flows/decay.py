"""Does the champion do worse on what arrives than on its own test pictures? Its deterministic loss on both.

A sample of the arrivals, chosen by the hash of their bytes, is examined in this process and denoised as the test
pictures were; what was measured is kept by the weights and the pictures, so an unchanged source costs nothing more.
Where a look would cost too much (few arrivals, tables, a large model without a GPU) it says so instead.
"""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cluster import stage, storage
from cluster.artifacts import Workspace, write_bytes_atomic
from cluster.registry import Version
from components import examine
from components.arrivals import Arrival, Arrivals
from components.dataset import TEST, DatasetVersion, Item
from components.errors import InputError
from components.images import Limits
from components.models import load_parts
from components.probation import Decay as Beside
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
    arrived = _sampled(seen)
    tests = parent.split(TEST)[:MOST]
    if min(len(arrived), len(tests)) < FEWEST:
        pictures = f"{len(arrived)} arrivals and {len(tests)} test pictures"
        return Decay(skipped=f"{pictures}, {FEWEST} of each are enough")
    model = resolve_model(config, champion.uri)
    try:
        (arrivals_N,) = _losses_on(config, workspace, [model], arrived, seen)
    except _SkippedError as why:
        return Decay(skipped=str(why))
    own = _path(workspace, model, [item.sha256 for item in tests])
    if not stage.fetch(own):
        _keep(own, model, tests, pixel_store(config, workspace).directory)
    return compare(np.load(own, allow_pickle=False).mean(axis=1), arrivals_N)


def decay_beside(
    config: Config, workspace: Workspace, models: tuple[ResolvedModel, ResolvedModel], seen: Arrivals
) -> Beside | None:
    """Return the losses of (former, new) champion on the same arrivals; None where there are few, and that is said."""
    arrived = _sampled(seen)
    try:
        if len(arrived) < FEWEST:
            raise _SkippedError(f"{len(arrived)} pictures arrived since, {FEWEST} are enough")
        return Beside(*_losses_on(config, workspace, models, arrived, seen))
    except _SkippedError as why:
        say(f"decay is not measured: {why}")
        return None


class _SkippedError(Exception):
    """Why losses on arrivals are not measured."""


def _sampled(seen: Arrivals) -> list[Arrival]:
    return sorted((one for one in seen.new if one.sha256), key=lambda one: one.sha256)[:MOST]


def _losses_on(
    config: Config, workspace: Workspace, models: Sequence[ResolvedModel], arrived: Sequence[Arrival], seen: Arrivals
) -> list[np.ndarray]:
    """Return each model's mean loss of every arrival that can be used (N,), the same arrivals for all models."""
    paths = [_path(workspace, model, [one.sha256 for one in arrived]) for model in models]
    missing = [(path, model) for path, model in zip(paths, models, strict=True) if not stage.fetch(path)]
    if missing:
        for _, model in missing:
            _check_cost(model)
        with tempfile.TemporaryDirectory(prefix="fresco-decay-") as folder:
            items = _examined(config, arrived, seen.cursor["source"], Path(folder))
            for path, model in missing:
                _keep(path, model, items, Path(folder))
    return [np.load(path, allow_pickle=False).mean(axis=1) for path in paths]


def _examined(config: Config, arrived: Sequence[Arrival], base: str, folder: Path) -> list[Item]:
    """Examine arrivals as `prepare` does, their pixels in `folder`."""
    if arrived[0].files[0].uri == base:
        base = base.rpartition("/")[0]
    files = SourceFiles(base, storage.aws_environment() if storage.is_s3(base) else {})
    limits = Limits(config.data.min_side_px, config.data.max_pixels)
    look = examine.make_examiner(
        examine.ExamineJob(config.data.source, files, limits, config.data.resolution_px, folder)
    )
    blocks = examine.candidate_blocks([one.candidate for one in arrived])
    found = [one for block in blocks for one in examine.read_found(look(block)) if not one.reason]
    items = [Item(one.sha256, one.caption, TEST, "") for one in {one.sha256: one for one in found}.values()]
    if len(items) < FEWEST:
        raise _SkippedError(f"{len(items)} of {len(arrived)} arrivals can be used, {FEWEST} are enough")
    return items


def compare(own_N: np.ndarray, arrivals_M: np.ndarray) -> Decay:
    """Return both means and the lower end of the one-sided 95 % interval of their ratio, less one."""
    own, arrived = float(own_N.mean()), float(arrivals_M.mean())
    spread = math.sqrt(sum(float(x.var(ddof=1)) / len(x) / float(x.mean()) ** 2 for x in (own_N, arrivals_M)))
    low = math.exp(math.log(arrived / own) - NORMAL_95 * spread) - 1
    return Decay(own, arrived, low, len(arrivals_M))


def _check_cost(model: ResolvedModel) -> None:
    import torch

    if torch.cuda.is_available():
        return
    parts = load_parts(model.directory, only={"denoiser"})
    count = sum(parameter.numel() for parameter in parts.denoiser.parameters())
    if count > MOST_PARAMETERS_ON_CPU:
        raise _SkippedError(f"a denoiser of {count / 1e6:.0f} M parameters without a GPU costs too much")


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
