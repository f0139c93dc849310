"""One endpoint: Ray Serve replicas that each own a model behind the routes of `images_api`, from start to clean end.

The model comes as an importable factory and plain arguments; nothing here knows what it draws. The port is checked
before anything starts. Serve's own limit is far above ours, so that a full endpoint is answered in OpenAI's shape.
"""

import errno
import logging
import random
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from cluster.carry import NOTHING, Carry
from cluster.companion import Companion
from cluster.errors import EndpointError, PlacementError
from cluster.painter_bridge import PainterBridge
from cluster.painter_loading import Follow
from cluster.placement import PlacementSection, ServeSection
from cluster.proxy_face import ASLEEP
from cluster.scaling import LoadReport, replica_options
from cluster.session import local_session

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.schema import LoggingConfig
    from starlette.types import ASGIApp

APPLICATION, DEPLOYMENT = "fresco", "images"
MOST_REQUESTS = 4096
"""Requests that Serve lets to a replica at a time: the engine refuses long before, and says when to come again."""
FREE_PORTS = range(20_000, 32_768)
"""Below those that Linux gives to outgoing connections, and above Ray's: a port is bound seconds after it was found."""
TRIED_PORTS = 50
POLL_S = 0.25
TELL_S = 20.0
"""A replica without a model stays so long to say why."""
HEALTH_CHECK_S = 2.0
"""A replica that was killed is missed after so long (Serve's default is 10 s)."""
REQUEST_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class ModelSource:
    """How a replica makes its model: an importable `module:function` and its keyword arguments (plain values)."""

    factory: str
    arguments: Mapping[str, Any]
    name: str
    """What clients call the model."""
    workspace: str
    """Folder for pictures handed out by address and for what is captured; all replicas share it."""
    follow: Follow | None = None
    """Where to look for the model that should serve; None serves the first one for ever."""
    carry: Carry = NOTHING
    """What a replica on any machine needs for a workspace on S3."""


class ImagesReplica:
    """What Serve runs: the model with its threads, and the routes made around it; it is made when the model can draw.

    A model that cannot be loaded makes a replica that says so, at /readyz and as a failed health check.
    """

    def __init__(self, source: ModelSource, settings: Mapping[str, Any], companion: object = None) -> None:
        from ray import serve

        from cluster.drawing_routes import Desk

        source.carry.before()
        self.bridge = PainterBridge(source.factory, source.arguments, source.follow)
        context = serve.get_replica_context()
        names = (context.replica_id.unique_id, context.app_name)
        limits = ServeSection(**settings)
        self.desk = Desk(self.bridge, limits, source.name, Path(source.workspace), *names)
        self.load_report = LoadReport()
        # Serve deals requests to a replica from here on: one that still loads would refuse what another could draw.
        self.bridge.wait_until_loaded(limits.ready_limit_s)
        self._made = time.monotonic()

    def __serve_build_asgi_app__(self) -> "ASGIApp":
        from cluster.images_api import make_app

        return make_app(self.desk)

    def check_health(self) -> None:
        """Let Serve start a fresh replica when the model could not be loaded or its loop has ended.

        Not at once: a replica that is unhealthy from the start never answers, and /readyz has to say what is wrong.
        """
        if self.bridge.problem and time.monotonic() - self._made > TELL_S:
            raise EndpointError(self.bridge.problem)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks this every second or so and tells the policy in `scaling`."""
        return self.load_report.of(self.bridge.numbers())

    def __del__(self) -> None:
        """Serve calls it when it ends a replica that has no request left."""
        self.bridge.close()
        self.desk.close()


@contextmanager
def endpoint(
    source: ModelSource, settings: ServeSection, placement: PlacementSection, application: str = APPLICATION
) -> Iterator[str]:
    """Serve a model for the length of the block; yields the URL once a first picture was drawn.

    Starts Ray (or shares the running one). Another `application` stands beside the one that serves, under a path of its
    own name, and never replaces it. PlacementError, before anything starts, when the port cannot be had;
    EndpointError when the model does not become ready.
    """
    port = find_port(settings.host, settings.port)
    # Training's needs must not decide whether an endpoint fits.
    # A joined cluster may grow with the replicas, a local one has its room from the start.
    replicas = max(1, settings.min_replicas) if placement.ray_address else settings.max_replicas
    each = {"cpus_per_worker": settings.cpus_per_replica, "gpus_per_worker": settings.gpus_per_replica}
    room = {"workers": replicas, **each}
    import ray

    shared = ray.is_initialized()
    with local_session(placement.model_copy(update=room)):
        try:
            route = "" if application == APPLICATION else f"/{application}"
            url = url_of(*_deploy(source, settings, port, application, route)) + route
            wait_until_ready(url, settings.ready_limit_s)
            yield url
        finally:
            _remove(application, shared and not placement.ray_address)


def _deploy(source: ModelSource, settings: ServeSection, port: int, application: str, route: str) -> tuple[str, int]:
    """Return host and port where Serve listens: on a cluster where it ran before, those that it was started with."""
    from ray import serve
    from ray.exceptions import RayActorError
    from ray.serve.config import HTTPOptions, ProxyLocation
    from ray.serve.context import _get_global_client

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    http = HTTPOptions(host=settings.host, port=port)
    try:
        serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=http, logging_config=_quiet())
        serve.run(make_application(source, settings), name=application, route_prefix=route or "/")
    except RayActorError as error:  # a proxy that is not up within seconds is ended by Serve's controller
        reason = str(error).strip().splitlines()[-1]
        raise EndpointError(
            f"Ray Serve expected to start, found one of its processes ended ({reason}); a machine with too much to do"
            " is a common cause: run the command again when it has less"
        ) from error
    client = _get_global_client()
    assert client is not None  # else it raised
    return str(client.http_config.host), int(client.http_config.port)


def make_application(
    source: ModelSource, settings: ServeSection, companion: Mapping[str, Any] | None = None
) -> "Application":
    """Return the endpoint as Serve deploys it; `companion` (arguments of `Companion`) runs beside the replicas."""
    from ray import serve

    as_deployment = serve.deployment(
        name=DEPLOYMENT,
        **replica_options(settings),
        # Where replicas must be replaced all the same, the new ones come first.
        max_surge_percent=100,
        health_check_period_s=HEALTH_CHECK_S,
        max_ongoing_requests=MOST_REQUESTS,
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": settings.gpus_per_replica},
        graceful_shutdown_timeout_s=settings.drain_s,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config=_quiet(),
    )
    images = as_deployment(serve.ingress()(ImagesReplica))
    if companion is None:
        return images.bind(source, settings.model_dump())
    beside = serve.deployment(name="companion", ray_actor_options={"num_cpus": 0}, logging_config=_quiet())
    return images.bind(source, settings.model_dump(), beside(Companion).bind(**companion))


def _quiet() -> "LoggingConfig":
    from ray.serve.schema import LoggingConfig

    return LoggingConfig(log_level="ERROR", enable_access_log=False)


def replica_memory_bytes(application: str) -> int:
    """Resident memory of an application's replicas on this machine, 0 where there are none."""
    found = 0
    for process in psutil.process_iter(["cmdline"]):
        if f"ServeReplica:{application}:" in " ".join(process.info["cmdline"] or []):
            with suppress(psutil.NoSuchProcess):
                found += process.memory_info().rss
    return found


def _remove(application: str, shared: bool) -> None:
    """Drain and end the replica. Serve itself ends with the Ray session, or here when that goes on in this process.

    On a cluster that was joined, Serve stays: other applications may run on it.
    """
    from ray import serve

    serve.delete(application)
    if shared:
        serve.shutdown()


def find_port(host: str, port: int) -> int:
    """Return `port`, or a free one for 0; PlacementError when it is taken or the host is not this machine's."""
    wanted = [port] if port else random.sample(FREE_PORTS, TRIED_PORTS)
    while True:
        try:
            return _bound(host, wanted.pop())
        except OSError as error:
            if wanted and error.errno == errno.EADDRINUSE:
                continue
            raise PlacementError(
                f"serve.port expected to be free on serve.host, found {host}:{port} not usable:"
                f" {error.strerror or error}; end what listens there, or choose another with --set serve.port=0 (0"
                " takes a free one)"
            ) from error


def _bound(host: str, port: int) -> int:
    address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with closing(socket.socket(address[0], socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address[4])
        probe.listen(1)
        return int(probe.getsockname()[1])


def url_of(host: str, port: int) -> str:
    """Return the address at which this machine reaches an endpoint bound to `host`."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def readiness(url: str) -> dict[str, Any] | None:
    """Ask an endpoint for its state, model version, dataset and run; None when nothing of ours answers."""
    import httpx

    try:
        answer = httpx.get(f"{url}/readyz", timeout=REQUEST_TIMEOUT_S, trust_env=False)
        status = answer.json()
    except (httpx.HTTPError, ValueError):
        return None
    return status if isinstance(status, dict) and "status" in status else None


def wait_until_ready(url: str, limit_s: float, notify: Callable[[str], None] | None = None) -> None:
    """Wait for the first drawing; EndpointError with the model's own words when it fails, or past the limit."""
    start = time.monotonic()
    while True:
        status = readiness(url) or {"status": "not answering"}
        if status["status"] in ("ready", ASLEEP):  # it has drawn, and may have had nothing to do since
            return
        waited_s = time.monotonic() - start
        if status["status"] == "failed":
            raise EndpointError(f"endpoint expected to load its model and draw, found: {status['error']}")
        if waited_s > limit_s:
            raise EndpointError(
                f"endpoint expected to be ready at {url} within {limit_s:.0f} s, found it {status['status']}; see"
                " Ray's logs under its temporary folder (logs/serve)"
            )
        if notify is not None:
            notify(f"the endpoint is {status['status']}: {waited_s:.0f} s of at most {limit_s:.0f} s")
        time.sleep(POLL_S)
