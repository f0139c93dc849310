"""What the whole test session shares: one local Ray, and tiny models on disk."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Two cores: one thread for each process, and no advice from libraries in the output.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray for every test that needs workers; verbs inside tests share it."""
    from cluster.placement import PlacementSection
    from cluster.session import local_session

    with local_session(PlacementSection(workers=2)):
        yield


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers directory of the Stable Diffusion family with random weights; draws 16 px pictures."""
    from components.models import make_tiny, save_parts

    directory = tmp_path_factory.mktemp("models") / "tiny-sd"
    save_parts(make_tiny("stable_diffusion", seed=0), directory)
    return directory


@pytest.fixture(scope="session")
def tiny_z_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers directory of the Z-Image family with random weights; draws 16 px pictures."""
    from components.models import make_tiny, save_parts

    directory = tmp_path_factory.mktemp("models") / "tiny-z-image"
    save_parts(make_tiny("z_image", seed=0), directory)
    return directory
