"""What the whole test session shares: one local Ray, and tiny models on disk."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.faults import Network
    from tests.machines import Machines

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


@pytest.fixture(scope="session")
def s3_network() -> Iterator["Network"]:
    """An S3 server behind a network that can be told to break; whole by itself."""
    from tests.faults import s3_server

    with s3_server() as network:
        yield network


@pytest.fixture
def bucket(s3_network: "Network", monkeypatch: pytest.MonkeyPatch) -> str:
    """The s3:// address of an empty bucket that the AWS_* variables of this test lead to."""
    from cluster import s3

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_network.url)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    s3_network.plan()
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    s3.client().create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture
def machines(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Machines":
    """Several machines with one workspace in that bucket."""
    from tests.machines import Machines

    return Machines(f"{bucket}/team/fresco", tmp_path / "machines", monkeypatch)
