"""Fresco's endpoint for the serving benchmark and the soak test: versions, `fresco serve`, its processes.

The endpoint is started as a person starts it (`fresco serve --detach`), so what is measured is what is shipped.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from cluster.artifacts import open_workspace
from cluster.champion import move_champion
from cluster.registry import TAG_MODEL_FINGERPRINT, Registry
from components.models import Parts, embedded_base, load_parts, save_parts
from flows import serve
from flows.config import Config
from flows.models import keep_in_workspace, open_registry, resolve_model

PERTURBED_BY = 0.02
"""Of each weight's spread: enough that no picture stays the same, too little to spoil them."""


@dataclass(frozen=True)
class Running:
    """An endpoint that answers."""

    url: str
    pid: int
    """The process of `fresco serve`; all others descend from it."""


def register_copies(config: Config, seeds: Sequence[int]) -> dict[int, Path]:
    """Register the base (seed 0) and perturbed copies of it (other seeds); return their directories by version.

    The first one becomes the champion.
    """
    workspace, registry = open_workspace(config.workspace), open_registry(config)
    versions: dict[int, Path] = {}
    for seed in seeds:
        directory = embedded_base()
        if seed:
            directory = workspace.root / "perturbed" / str(seed)
            save_parts(perturbed(load_parts(embedded_base()), seed), directory)
        found = resolve_model(config, str(directory))
        kept = keep_in_workspace(workspace, found)
        tags = {**found.lineage, TAG_MODEL_FINGERPRINT: found.fingerprint}
        versions[registry.register(config.name, kept, tags).number] = kept
    promote(registry, config, min(versions))
    return versions


def promote(registry: Registry, config: Config, version: int) -> None:
    """Move the alias as `fresco promote` does, without its gate."""
    move_champion(registry, config.name, version, {"reasons": ["a swap under load, for measurement"]})


def perturbed(parts: Parts, seed: int) -> Parts:
    """Return a copy whose denoiser weights have moved a little at random: another version of the same size."""
    changed = copy.deepcopy(parts)
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in changed.denoiser.parameters():
            if weight.numel() > 1:
                weight += PERTURBED_BY * weight.std() * torch.randn(weight.shape, generator=chance)
    return changed


@contextmanager
def served(config: Config) -> Iterator[Running]:
    """Run `fresco serve --detach` for the length of the block; within `ended_by_signals` it never outlives it."""
    try:
        answer = serve.run(config, detach=True)
        yield Running(answer["url"], answer["pid"])
    finally:
        serve.run(config, stop=True)


def replicas(pid: int, application: str) -> list[psutil.Process]:
    """The replica processes of an application among the descendants of `pid`: other endpoints are not looked at."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if f"ServeReplica:{application}:" in " ".join(process.cmdline()):
                    found.append(process)
    return found


def resident_bytes(processes: Sequence[psutil.Process]) -> int:
    """Resident memory of processes, those that are gone left out."""
    total = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total
