"""The endpoint as an application of a Serve that somebody else runs, deployed from a config file as KubeRay does it."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cluster.artifacts import open_workspace
from cluster.errors import PlacementError, RegistryError
from cluster.placement import PlacementSection
from cluster.serving import APPLICATION, readiness
from cluster.session import local_session
from flows import serve
from flows.config import Config, with_overrides
from flows.serve_app import AppArguments, app
from tests.flows.test_serve import set_champion
from tests.servers import free_port

pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.")
LIMIT_S = 120


def written(config: Config, folder: Path) -> Path:
    path = folder / "fresco.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def until(condition: Callable[[], Any]) -> Any:
    limit = time.monotonic() + LIMIT_S
    while not (found := condition()):
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.2)
    return found


@pytest.fixture
def keyed(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Config, str]:
    """The config with a file of keys, and the key in it."""
    keyed = with_overrides(config, {"serve.api_keys_file": str(tmp_path / "keys.yaml"), "serve.host": "0.0.0.0"})
    return keyed, serve.make_key(keyed, "test")["key"]


@pytest.fixture
def other_serve() -> Iterator[int]:
    """A Ray with a Serve that is not ours; its port."""
    from ray import serve as ray_serve
    from ray.serve.config import HTTPOptions

    port = free_port()
    with local_session(PlacementSection(workers=1)):
        ray_serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
        yield port
        ray_serve.shutdown()


def test_without_keys_it_is_refused_wherever_serve_may_listen(config: Config, tmp_path: Path, make_run) -> None:
    arguments = AppArguments(config=str(written(config, tmp_path)))
    with pytest.raises(PlacementError, match="without keys: anybody could draw"):
        app(arguments)


def test_without_a_champion_the_command_that_makes_one_is_told(keyed: tuple[Config, str], tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="found no champion; run: fresco promote"):
        app(AppArguments(config=str(written(keyed[0], tmp_path))))


def test_replicas_on_machines_without_a_common_disk_are_refused(keyed: tuple[Config, str], tmp_path: Path) -> None:
    far = {"workspace": "s3://bucket/w", "placement.tracking_uri": "http://127.0.0.1:9"}
    config = with_overrides(keyed[0], {**far, "serve.max_replicas": 2})
    with pytest.raises(PlacementError, match=r"serve\.max_replicas expected 1 with a workspace on S3 .* found 2"):
        app(AppArguments(config=str(written(config, tmp_path))))


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="confg"):
        AppArguments.model_validate({"confg": "fresco.yaml"})


@pytest.mark.slow  # an endpoint on a Ray Serve of its own
def test_deployed_from_a_config_it_answers_and_follows_the_champion(
    keyed: tuple[Config, str], tmp_path: Path, make_run, other_serve: int
) -> None:
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    config, key = keyed
    config = with_overrides(config, {"serve.port": other_serve, "serve.public_url": "http://fresco.test"})
    make_run("fresco-aaa", 0)
    first = set_champion(config, "fresco-aaa")
    application = {
        "name": APPLICATION,
        "import_path": "flows.serve_app:app",
        "route_prefix": "/",
        "args": {"config": str(written(config, tmp_path))},
    }
    client = _get_global_client()
    assert client is not None
    options = {"host": "127.0.0.1", "port": other_serve}
    client.deploy_apps(ServeDeploySchema(http_options=options, applications=[application]), _blocking=True)

    url = f"http://127.0.0.1:{other_serve}"
    until(lambda: (readiness(url) or {}).get("status") == "ready")
    body = {"prompt": "a red circle", "seed": 1}
    refused = httpx.post(f"{url}/v1/images/generations", json=body, timeout=LIMIT_S, trust_env=False)
    assert refused.status_code == 401
    headers = {"Authorization": f"Bearer {key}"}

    def draw() -> int:
        answer = httpx.post(
            f"{url}/v1/images/generations", json=body, headers=headers, timeout=LIMIT_S, trust_env=False
        )
        assert answer.status_code == 200, answer.text
        return int(answer.json()["model_version"])

    assert draw() == first
    workspace = open_workspace(config.workspace)
    record = until(lambda: serve.endpoint_of(workspace))
    assert record["url"] == "http://fresco.test" and record["model_version"] == first

    make_run("fresco-bbb", 1)
    second = set_champion(config, "fresco-bbb")
    until(lambda: (readiness(url) or {}).get("model_version") == second)
    assert draw() == second
    until(lambda: (serve.endpoint_of(workspace) or {}).get("model_version") == second)
    client.delete_apps([APPLICATION])
    until(lambda: not (workspace.root / "endpoint.json").exists() and serve.server_of(workspace) is None)
