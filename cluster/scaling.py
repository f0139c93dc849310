"""How many replicas? As many as draw what waits within `serve.target_backlog_s`, measured in pixel-steps, not requests.

A request for four large pictures is a hundred times the work of one small one, so counting requests says little. Each
replica reports what it still has to draw, how fast it draws and how busy it was; Ray Serve's controller asks the policy
here and applies delays and bounds. Asked for nothing, every replica but `serve.min_replicas` is drained and ended.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.placement import ServeSection

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

POLICY = "cluster.scaling:BacklogPolicy"
BACKLOG, RATE, BUSY = "backlog_pixel_steps", "pixel_steps_per_s", "busy"
LOOK_BACK_S = 5.0
"""Serve averages reports over it and takes five of them meanwhile."""
FULL = 0.8
"""Busier than this, on average, and a replica is not taken away: the others could not do its work."""


@dataclass(frozen=True)
class Load:
    """What one replica reported."""

    backlog_pixel_steps: float
    """Pixels times denoiser evaluations that are still to be made."""
    pixel_steps_per_s: float
    """Measured speed; 0 before anything was measured."""
    busy: float
    """Share of the last seconds in which the denoiser ran, 0 to 1."""


def wanted_replicas(loads: Sequence[Load], current: int, target_backlog_s: float) -> int:
    """Return how many replicas draw the whole backlog within `target_backlog_s`, at the speed they were measured at.

    Backlog alone adds replicas; a high load only keeps what is there, because a single client that asks again as soon
    as it is answered keeps one replica busy and gains nothing from a second. Nothing measured leaves all as it is.
    """
    speeds = [load.pixel_steps_per_s for load in loads if load.pixel_steps_per_s > 0]
    if not speeds:
        return current
    backlog_s = sum(load.backlog_pixel_steps for load in loads) / (sum(speeds) / len(speeds))
    for_backlog = math.ceil(backlog_s / target_backlog_s)
    for_speed = math.ceil(sum(load.busy for load in loads) / FULL)
    return max(for_backlog, min(current, for_speed))


class BacklogPolicy:
    """`wanted_replicas` as Ray Serve's controller calls it."""

    def __init__(self, target_backlog_s: float) -> None:
        self.target_backlog_s = target_backlog_s

    def __call__(self, context: "AutoscalingContext") -> tuple[int, dict[str, Any]]:
        reports: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
        loads = [
            Load(backlog, reports.get(RATE, {}).get(replica, 0.0), reports.get(BUSY, {}).get(replica, 0.0))
            for replica, backlog in reports.get(BACKLOG, {}).items()
        ]
        # A replica that has not reported yet has just started: nothing is known against keeping it.
        current = context.target_num_replicas
        if len(loads) < context.current_num_replicas:
            return current, {}
        return wanted_replicas(loads, current, self.target_backlog_s), {}


class LoadReport:
    """What one replica tells the policy; `read` returns the engine's numbers (see `serve_metrics`)."""

    def __init__(self) -> None:
        self._at, self._stepping_s = time.monotonic(), 0.0

    def of(self, numbers: Mapping[str, Any]) -> dict[str, float]:
        """Return a report; how busy the replica was is counted since the report before."""
        now, stepping_s = time.monotonic(), float(numbers.get("stepping_s") or 0.0)
        busy = (stepping_s - self._stepping_s) / max(now - self._at, 1e-3)
        self._at, self._stepping_s = now, stepping_s
        backlog, rate = numbers.get("backlog_pixel_steps"), numbers.get("rate")
        return {BACKLOG: float(backlog or 0), RATE: float(rate or 0), BUSY: min(1.0, max(0.0, busy))}


def replica_options(settings: ServeSection) -> dict[str, Any]:
    """Return the options of a Serve deployment that decide its number of replicas."""
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

    if settings.min_replicas == settings.max_replicas:
        return {"num_replicas": settings.max_replicas}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=settings.min_replicas,
            max_replicas=settings.max_replicas,
            # Whoever starts an endpoint wants to see it draw, even if it may sleep later.
            initial_replicas=max(1, settings.min_replicas),
            upscale_delay_s=settings.upscale_delay_s,
            downscale_delay_s=settings.downscale_delay_s,
            look_back_period_s=LOOK_BACK_S,
            policy=AutoscalingPolicy(
                policy_function=POLICY, policy_kwargs={"target_backlog_s": settings.target_backlog_s}
            ),
        )
    }
