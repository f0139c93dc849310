"""Start or join Ray for the length of a verb, quietly, and leave nothing running behind.

With `placement.ray_address` a running cluster is joined; without it a local one is started on free ports and ended at
exit. Inside a process that already has Ray (tests, `demo`) the running session is shared and left alone.
"""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import PlacementError
from cluster.placement import PlacementSection
from cluster.signals import handlers_kept

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
QUIET_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Two loaded cores that import torch and deepspeed in two processes can need more than the default 60 s.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    # Serve's proxy names requests too, and would add a second x-request-id beside ours; its errors are plain text.
    CALLBACK: "cluster.proxy_face:around_proxy",
    # Replicas tell their backlog so often (default 10 s): a burst should not wait for the next report.
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
OBJECT_STORE_BYTES = 400 * 2**20


@contextmanager
def local_session(placement: PlacementSection) -> Iterator[None]:
    """Hold a Ray session; PlacementError when the placement can never be scheduled on it.

    Signals go on to do what they did before: Ray's handlers would cut short what cleans up.
    """
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    shared = ray.is_initialized()
    with handlers_kept() as listen:
        if not shared:
            _start(placement)
            listen()
        try:
            check_fits(placement)
            yield
        finally:
            if not shared:
                ray.shutdown()


def _start(placement: PlacementSection) -> None:
    import ray

    if placement.ray_address:
        try:
            # What this verb starts there, Ray Serve's proxy included, must know what the local one would.
            naming = {"env_vars": {CALLBACK: QUIET_ENVIRONMENT[CALLBACK]}}
            address = placement.ray_address
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=naming)
        except ConnectionError as error:
            raise PlacementError(
                f"placement.ray_address expected a running Ray cluster at {placement.ray_address!r}, found none:"
                f" {error}; start it or leave the address empty for a local one"
            ) from error
        return
    ray.init(
        address="local",
        # Logical CPUs only decide what may be scheduled: never fewer than one worker group needs, so that a laptop
        # with 2 cores can train with 2 workers and still place the light driver tasks.
        num_cpus=max(os.cpu_count() or 1, int(placement.workers * placement.cpus_per_worker)) + 1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=OBJECT_STORE_BYTES,
        # Socket paths under it must stay below 107 bytes: a short folder beside the system's temporary files.
        _temp_dir=str(Path(tempfile.gettempdir()) / f"fresco-ray-{os.getuid()}"),
        runtime_env={"env_vars": dict(QUIET_ENVIRONMENT)},
    )


def groups_that_fit(placement: PlacementSection) -> int:
    """Return how many worker groups the cluster has room for at the same time, at least one."""
    import ray

    have = ray.cluster_resources()
    cores = have.get("CPU", 0)
    if not placement.ray_address:
        cores = min(cores, os.cpu_count() or 1)  # logical CPUs of a local session are rounded up
    rooms = [cores / (placement.workers * placement.cpus_per_worker)]
    if placement.gpus_per_worker:
        rooms.append(have.get("GPU", 0) / (placement.workers * placement.gpus_per_worker))
    return max(1, int(min(rooms)))


def check_fits(placement: PlacementSection) -> None:
    """Refuse at once what the cluster can never place, with the arithmetic."""
    import ray

    have = ray.cluster_resources()
    for resource, each in (("CPU", placement.cpus_per_worker), ("GPU", placement.gpus_per_worker)):
        need = placement.workers * each
        if need > have.get(resource, 0):
            raise PlacementError(
                f"placement needs {placement.workers} workers x {each:g} {resource} = {need:g} {resource}, the Ray"
                f" cluster has {have.get(resource, 0):g}; lower placement.workers or"
                f" placement.{resource.lower()}s_per_worker, or join a larger cluster with placement.ray_address"
            )
