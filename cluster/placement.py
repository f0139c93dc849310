"""The config sections that must not change the result: workers, devices, ZeRO stage, micro batch, addresses, limits.

Nothing here enters a run's fingerprint. The batch arithmetic is here too: how a global batch is dealt to workers.
Light on purpose: importing it costs no torch and no ray.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cluster.errors import PlacementError
from cluster.redaction import HIDDEN, holds_credentials

LOAD_LIMIT_S, COMPILE_LIMIT_S = 300.0, 240.0
"""How long a model may take until it draws, and how much longer for every number of rows that is compiled."""


class Section(BaseModel):
    """A frozen group of settings; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class PlacementSection(Section):
    workers: int = Field(2, ge=1)
    """Training processes."""
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: float = Field(0, ge=0)
    """0 trains on the CPU with gloo; 1 on CUDA with nccl."""
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """deepspeed shards with ZeRO; torch is the plain data-parallel engine."""
    zero_stage: int | Literal["auto"] = "auto"
    """ZeRO stage 0 to 3; auto takes the lowest that fits in memory. Ignored by the torch engine."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Keep optimizer state (ZeRO 1-3) or parameters too (ZeRO 3) in host memory; only with GPUs."""
    micro_batch: int = Field(0, ge=0)
    """Pictures per forward pass and worker; 0 takes the whole share of a worker."""
    max_failures: int = Field(3, ge=0)
    """Restarts of the worker group before the run fails."""
    checkpoint_every_steps: int = Field(100, ge=1)
    """Optimizer steps between resumable checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    ray_address: str = ""
    """Address of a running Ray cluster; empty starts a local one for the verb."""
    tracking_uri: str = ""
    """MLflow tracking server; empty keeps a SQLite database in the workspace.

    User and password are no part of it: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment.
    """

    @field_validator("tracking_uri", mode="wrap")
    @classmethod
    def _without_credentials(cls, uri: Any, check: Callable[[Any], str]) -> str:
        if holds_credentials(str(uri)):  # not told: pydantic's own report would quote it
            raise PlacementError(
                f"placement.tracking_uri expected an address without user and password, found {HIDDEN}; records and"
                " logs hold the address, so set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the"
                " environment (also of a cluster's nodes) and name http://HOST:PORT"
            )
        return check(uri)


class ServeSection(Section):
    host: str = "127.0.0.1"
    port: int = Field(0, ge=0, le=65535)
    """0 takes a free port."""
    default_steps: int = Field(20, ge=1)
    default_guidance_scale: float = Field(3.0, ge=0)
    max_images: int = Field(8, ge=1)
    """Largest `n` of one request."""
    max_prompt_chars: int = Field(2000, ge=1)
    max_steps: int = Field(100, ge=1)
    max_guidance_scale: float = Field(30.0, gt=0)
    max_side_px: int = Field(512, ge=8)
    max_output_side_px: int = Field(2048, ge=8)
    """Largest side of what is handed out, after retouching steps that enlarge."""
    max_queue: int = Field(64, ge=1)
    """Pictures waiting for the denoiser; a request that finds no room is answered 429 with Retry-After.

    With API keys, a key that has pictures waiting holds at most its share by priority of a queue that is more than half
    full, one share being left for a key that has none. Each replica has a queue of its own.
    """
    max_batch_rows: int = Field(64, ge=2)
    """Denoiser rows of one step, of all requests together; a guided picture needs two."""
    max_live_pixels: int = Field(64 * 1024 * 1024, ge=64)
    """Pixels of all pictures at work, whatever their sizes; more wait. Lower it where steps run out of memory."""
    max_cached_prompts: int = Field(1024, ge=0)
    """Prompts whose text states are kept, so that a repeated prompt is not encoded again."""
    max_cached_text_bytes: int = Field(512 * 1024 * 1024, ge=0)
    """Of those states; Z-Image's take 2.6 MB a prompt. Two versions are loaded during a swap, each with its own."""
    strict: bool = False
    """Draw in calls of one size: in fp32 on a CPU the same bits in any company, at the price of full calls."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of denoiser and text encoder; auto: fp32 on the CPU, bf16 on a GPU. The autoencoder is always fp32."""
    row_buckets: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Numbers of rows a denoiser call may have, ascending; spare rows fill it up to the next. Empty: any number."""
    compile: bool = False
    """Compile the denoiser for every bucket at the model's own size before it serves; without buckets 1, 2, 4 ..."""
    blocklist_file: str = ""
    """Text file of words and phrases, by [category]; a prompt that says one is refused. Empty refuses none."""
    safety_classifier: str = ""
    """module:function or FILE.py:function that makes a judge of prompts and pictures; empty judges none."""
    safety_options: dict[str, Any] = {}
    """Keyword arguments of the classifier's function."""
    follow_s: float = Field(5.0, gt=0)
    """Seconds between looks at the registry: who is champion, who challenger? A new one loads beside the old."""
    challenger_share: float = Field(0.0, ge=0, le=1)
    """Share of requests that the version with the alias challenger answers; a request id is always on the same side."""
    shadow_share: float = Field(0.0, ge=0, le=1)
    """Share of the champion's requests that the challenger draws too, for the metrics only; edits are left out."""
    memory_headroom_bytes: int = Field(256 * 2**20, ge=0)
    """Memory to stay free beside two models; where it would not, requests wait while the old one makes room."""
    swap_wait_s: float = Field(60.0, ge=0)
    """How long a request waits while the old model makes room for the new; it is answered 503 afterwards."""
    max_body_bytes: int = Field(1_000_000, ge=1024)
    """Largest JSON body; a larger one is answered 413 before it is held in memory."""
    api_keys_file: str = ""
    """YAML list of key hashes with names, rate limits and priorities; empty asks for no keys (this machine only).

    Each replica counts for itself: a key may send up to its limit times `max_replicas`.
    """
    max_upload_bytes: int = Field(20_000_000, ge=1024)
    """Largest body of an edit: picture, mask and fields together."""
    max_upload_pixels: int = Field(16_000_000, ge=256)
    """Most pixels of a picture to edit, by its header: small files can hold enormous pictures."""
    max_partial_images: int = Field(3, ge=0)
    """Most unfinished pictures a stream may ask for; 3 is OpenAI's."""
    max_deadline_s: float = Field(600.0, gt=0)
    default_strength: float = Field(0.6, gt=0, le=1)
    """How much of an edited picture is redrawn when the request does not say."""
    url_ttl_s: float = Field(3600.0, gt=0)
    """How long a picture asked for with response_format=url is kept."""
    url_max_bytes: int = Field(1_000_000_000, ge=1024)
    """Of all kept pictures together; above it, those that expire first are removed first."""
    public_url: str = ""
    """Where clients reach the endpoint, for the addresses of pictures; empty: as the request says.

    Where serve.host is not this machine alone, endpoint.json names it too.
    """
    capture_share: float = Field(0.2, ge=0, le=1)
    """Share of requests whose features are kept for the monitor; 0 keeps none."""
    capture_prompts: bool = False
    """Keep prompts as text too, not as features alone."""
    capture_max_bytes: int = Field(1_000_000_000, ge=1)
    """Of all captured shards together; the oldest are removed first."""
    min_replicas: int = Field(1, ge=0)
    """Replicas that always run; with 0 the endpoint sleeps when nobody asks, and the first request waits for it."""
    max_replicas: int = Field(1, ge=1)
    """Most replicas; above min_replicas their number follows the work that waits."""
    target_backlog_s: float = Field(5.0, gt=0)
    """Seconds of drawing that may wait for each replica, at its measured speed, before another one is added."""
    upscale_delay_s: float = Field(5.0, ge=0)
    """How long more replicas must have been wanted before one is added."""
    downscale_delay_s: float = Field(120.0, ge=0)
    """How long fewer replicas must have been enough before one is drained and ended."""
    drain_s: float = Field(60.0, gt=0)
    """A replica that is to end gets so long to finish what it draws."""
    threads: int = Field(0, ge=0)
    """Threads of a replica that draws on a CPU; 0: for each call of the denoiser the number that draws a first picture
    fastest, and calls of many rows are cut into parts for the cores that are left."""
    otlp_endpoint: str = ""
    """OpenTelemetry collector that gets a trace of each request by OTLP/HTTP, such as http://HOST:4318; empty: none."""
    cpus_per_replica: float = Field(0.5, gt=0)
    """Logical CPUs a replica reserves; a fraction leaves room for training on the same machine."""
    gpus_per_replica: float = Field(0, ge=0)

    @field_validator("api_keys_file", "blocklist_file")
    @classmethod
    def _absolute(cls, path: str) -> str:
        """Replicas run in folders of their own."""
        return str(Path(path).expanduser().absolute()) if path else ""

    @field_validator("safety_classifier")
    @classmethod
    def _absolute_file(cls, name: str) -> str:
        place, colon, function = name.rpartition(":")
        return f"{Path(place).expanduser().absolute()}{colon}{function}" if place.endswith(".py") else name

    @field_validator("otlp_endpoint")
    @classmethod
    def _web_address(cls, address: str) -> str:
        if address and not re.fullmatch(r"https?://[^/\s]+(/\S*)?", address):
            raise ValueError(f"expected an address such as http://HOST:4318, or nothing, found {address!r}")
        return address.rstrip("/")

    @model_validator(mode="after")
    def _replicas_are_a_range(self) -> "ServeSection":
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"serve.min_replicas expected at most serve.max_replicas ({self.max_replicas}), found"
                f" {self.min_replicas}; raise max_replicas or lower min_replicas"
            )
        return self

    @model_validator(mode="after")
    def _largest_request_can_wait(self) -> "ServeSection":
        if self.max_queue < self.max_images:
            raise ValueError(
                f"serve.max_queue expected at least serve.max_images ({self.max_images}), found {self.max_queue}: the"
                " largest request could never wait; raise max_queue or lower max_images"
            )
        return self

    @model_validator(mode="after")
    def _largest_picture_can_be_drawn(self) -> "ServeSection":
        if self.max_live_pixels < self.max_side_px**2:
            raise ValueError(
                f"serve.max_live_pixels expected at least {self.max_side_px**2}, the pixels of the largest picture"
                f" (serve.max_side_px), found {self.max_live_pixels}; raise it or lower max_side_px"
            )
        return self

    @model_validator(mode="after")
    def _buckets_are_call_sizes(self) -> "ServeSection":
        sizes = self.row_buckets
        if sorted(set(sizes)) != list(sizes) or (sizes and sizes[-1] > self.max_batch_rows):
            raise ValueError(
                f"serve.row_buckets expected different numbers of rows up to serve.max_batch_rows"
                f" ({self.max_batch_rows}), the smallest first, found {list(sizes)}"
            )
        if sizes and self.strict:
            raise ValueError(
                f"serve.row_buckets expected to be empty with serve.strict, whose calls all have max_batch_rows rows,"
                f" found {list(sizes)}; choose one of the two"
            )
        return self

    @property
    def buckets(self) -> tuple[int, ...]:
        """The row buckets, where compiling takes powers of two by itself those; strict mode needs none."""
        if self.row_buckets or self.strict or not self.compile:
            return self.row_buckets
        powers = (2**exponent for exponent in range(self.max_batch_rows.bit_length()))
        return tuple(sorted({*powers, self.max_batch_rows}))

    @property
    def ready_limit_s(self) -> float:
        """How long a replica may take until it draws: every bucket that is compiled has its own time."""
        num_compiled = (1 if self.strict else len(self.buckets)) if self.compile else 0
        return LOAD_LIMIT_S + num_compiled * COMPILE_LIMIT_S


@dataclass(frozen=True)
class BatchPlan:
    """global_batch = workers x micro_batch x accumulation."""

    global_batch: int
    workers: int
    micro_batch: int
    accumulation: int

    @property
    def per_worker(self) -> int:
        return self.micro_batch * self.accumulation

    def __str__(self) -> str:
        return (
            f"global batch {self.global_batch} = {self.workers} workers x micro batch {self.micro_batch}"
            f" x {self.accumulation} accumulation steps"
        )


def plan_batch(global_batch: int, workers: int, micro_batch: int) -> BatchPlan:
    """Deal a global batch to workers; PlacementError with the arithmetic when it does not divide."""
    if global_batch % workers:
        raise PlacementError(
            f"train.global_batch must divide by placement.workers: {global_batch} / {workers} ="
            f" {global_batch / workers:.2f}; set train.global_batch to a multiple of {workers}"
        )
    per_worker = global_batch // workers
    micro = micro_batch or per_worker
    if per_worker % micro:
        raise PlacementError(
            f"placement.micro_batch must divide a worker's share: {global_batch} pictures / {workers} workers ="
            f" {per_worker} each, and {per_worker} / {micro} = {per_worker / micro:.2f}; set placement.micro_batch to"
            f" one of {', '.join(str(d) for d in range(1, per_worker + 1) if per_worker % d == 0)}"
        )
    return BatchPlan(global_batch, workers, micro, per_worker // micro)


def check_placement(placement: PlacementSection) -> None:
    """Refuse combinations that can never run, before anything starts."""
    stage = placement.zero_stage
    if stage != "auto" and stage not in (0, 1, 2, 3):
        raise PlacementError(f"placement.zero_stage expected to be auto, 0, 1, 2 or 3, found {stage}")
    if placement.offload != "none" and not placement.gpus_per_worker:
        raise PlacementError("placement.offload moves state from GPU to host memory; set it to none on CPU workers")
    if placement.offload != "none" and (placement.engine != "deepspeed" or stage == 0):
        raise PlacementError("placement.offload needs placement.engine=deepspeed and placement.zero_stage 1, 2 or 3")
    if placement.offload == "all" and stage not in (3, "auto"):
        raise PlacementError("placement.offload=all needs placement.zero_stage 3")
