"""The config sections of the standing loop: when drift is said (`monitor`), when and how to train again (`retrain`).

They decide what the loop does next, never what a run's result is: what of them reaches a run (steps, replay, averaging)
becomes part of that run's recipe, and of its fingerprint, when the loop writes its config.
"""

from typing import Literal

from pydantic import Field, field_validator

from components.recipe import Section

Stream = Literal["images", "captions", "alignment", "prompts"]


class MonitorSection(Section):
    """When the arrivals are said to have drifted; the method is told in docs/drift.md."""

    window: int = Field(1000, ge=20, le=5000)
    """Arrivals, and reference pictures, that one look compares at most: a uniform sample of what arrived."""
    false_alarms_per_year: float = Field(1.0, gt=0, le=365)
    """Alarms without drift that all looks of a year may raise together, on average."""
    encoder: str = ""
    """transformers CLIP directory that sees pictures and texts; empty: the embedded tiny CLIP."""
    streams: tuple[Stream, ...] = ("images", "captions", "alignment", "prompts")
    """Those that may raise the alarm; prompts only where an endpoint captured some."""
    smallest_concept: float = Field(0.1, gt=0, le=1)
    """Share of the arrivals; a new concept of this share must have been found for `no_drift` to be said."""
    smallest_mismatch: float = Field(0.75, gt=0, le=1)
    """Share of the arrivals; so many wrong captions must have been found for `no_drift` of the alignment."""
    power: float = Field(0.8, gt=0.5, lt=1)
    """Chance of finding them."""
    smallest_effect: float = Field(0.02, ge=0, le=1)
    """Differences below this share of the arrivals are not drift, however sure."""
    settle_s: float = Field(60.0, ge=0)
    """A file counts as arrived when it did not change between two looks this far apart."""


class RetrainSection(Section):
    """When to train again, on what budget, and how a new champion is watched."""

    schedule: str = ""
    """Cron expression such as "0 3 * * 1" (Mondays at 03:00); empty: no schedule. Missed ticks count as one."""
    time_zone: str = "UTC"
    """IANA name of the schedule's time zone."""
    min_new_images: int = Field(200, ge=0)
    """Arrivals that are a reason to train by themselves; 0: their number is no reason."""
    on_drift: bool = True
    """Whether the monitor's verdict `drift` is a reason to train."""
    max_decay: float = Field(0.1, ge=0)
    """Share by which the champion's loss on arrivals may exceed that on its own test pictures; 0: no reason."""
    cooldown_s: float = Field(3600.0, ge=0)
    """Between the end of one retraining and the begin of the next; only a manual trigger is not held back."""
    look_every_s: float = Field(60.0, gt=0)
    """Between two looks of the standing loop."""
    budget_steps_per_week: int = Field(0, ge=0)
    """Optimizer steps in any 7 days; 0: no limit. A cycle that would exceed it waits, and the journal says so."""
    budget_gpu_hours_per_week: float = Field(0.0, ge=0)
    """Workers' GPU hours in any 7 days; 0: no limit."""
    steps: int = Field(0, ge=0)
    """Optimizer steps of one continuation; 0: train.steps."""
    replay_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of each batch drawn from the champion's data when nothing drifted; grows with the measured drift."""
    most_replay_fraction: float = Field(0.5, ge=0, lt=1)
    """Share at full drift."""
    average_with_champion: float = Field(0.0, ge=0, lt=1)
    """Share of the champion's weights in the weights that are exported; 0: none."""
    anchor_every: int = Field(5, ge=0)
    """Every so many cycles the training starts from model.base on everything instead; 0: never."""
    search_every: int = Field(0, ge=0)
    """In the first cycle and then every so many, the recipe is searched again; 0: never."""
    watch_s: float = Field(300.0, ge=0)
    """How long a new champion is watched before the cycle ends; 0: not at all."""
    canary_share: float = Field(0.1, ge=0, le=0.5)
    """Share of requests that the new version answers before it becomes champion, where there is traffic; 0: none."""
    max_error_share: float = Field(0.01, ge=0, le=1)
    """Share of failed requests, beyond the former champion's, at which the new one is rolled back."""
    max_slowdown: float = Field(0.5, ge=0)
    """Share by which its time per step may be longer."""
    lease_ttl_s: float = Field(30.0, ge=2)
    """After so long without a heartbeat a dead loop's work is taken over."""
    webhook: str = ""
    """Address (https, or http on this machine) that is told of every decision, at most once; empty: none."""
    webhook_secret_file: str = ""
    """File with the key of the signature (HMAC-SHA256) that each message to the webhook carries."""
    command: str = ""
    """Program (with arguments) that gets every decision, at most once, as JSON on its standard input; empty: none."""

    @field_validator("time_zone")
    @classmethod
    def _known_zone(cls, name: str) -> str:
        from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

        try:
            ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError("expected an IANA time zone such as Europe/Berlin") from None
        return name

    @field_validator("schedule")
    @classmethod
    def _readable(cls, expression: str) -> str:
        from components.schedule import check

        return check(expression) if expression else expression
