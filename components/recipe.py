"""The config sections about the result: data, model, training, evaluation, and the gate.

Everything here is part of a run's identity (its fingerprint) unless the field's note says otherwise. What must not
change the result (workers, devices, micro batch, addresses) lives in `cluster/placement.py`. Names of plans, schedules,
weightings and optimizers are checked here, so that a typo is an error before anything starts.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

PLANS = ("denoiser", "denoiser_attention", "text_encoder", "text_encoder_top:K", "all", "lora:R")


class Section(BaseModel):
    """A frozen group of settings; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class DataSection(Section):
    source: str = "emblems://drifted?count=1200&seed=1"
    """Folder, s3:// prefix, or emblems://WORLD?count=N&seed=S (built in). A location: not part of the fingerprint."""
    version: str = ""
    """Dataset version (`name@fingerprint`) to use as it is; empty: what data.source holds now."""
    resolution_px: int = Field(64, ge=16, le=4096, multiple_of=8)
    """Side of the square every picture is cropped and scaled to."""
    validation_fraction: float = Field(0.1, gt=0, lt=0.5)
    """Share of the pictures (by hash of their bytes) whose loss is watched while training."""
    test_fraction: float = Field(0.1, gt=0, lt=0.5)
    """Share of the pictures kept for the scorecard."""
    max_rejected_fraction: float = Field(0.1, ge=0, le=1)
    """`prepare` fails when a larger share of the candidates is rejected."""
    min_side_px: int = Field(16, ge=1)
    """Pictures with a shorter side are rejected as too small."""
    max_pixels: int = Field(50_000_000, ge=1)
    """Pictures that would decode to more pixels are rejected as decompression bombs."""


class ModelSection(Section):
    base: str = ""
    """Diffusers directory to start from; empty: the embedded base. Fingerprinted by its weights, not its path."""
    clip: str = ""
    """transformers CLIP directory for the scorecard; empty: the embedded tiny CLIP. Not part of the fingerprint."""


class LearningRate(Section):
    denoiser: float = Field(1e-3, ge=0)
    """Peak rate of the denoiser's parameters."""
    text_encoder: float = Field(2e-4, ge=0)
    """Peak rate of the text encoder's parameters; ignored when the plan freezes it."""


class TrainSection(Section):
    steps: int = Field(300, ge=1)
    """Optimizer steps."""
    global_batch: int = Field(32, ge=1)
    """Pictures per optimizer step over all workers."""
    freezing: str = "all"
    """What trains: denoiser, denoiser_attention, text_encoder, text_encoder_top:K, all, lora:R."""
    learning_rate: LearningRate = LearningRate()
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled decay; never applied to norms, biases and embeddings."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of sgd; ignored by adamw."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """How the learning rate falls after the warm-up; cosine and linear reach 1 % of the peak at the last step."""
    warmup_steps: int = Field(20, ge=0)
    """Optimizer steps of linear warm-up, whatever the number of workers; the peak is reached when steps is more."""
    weighting: Literal["none", "min_snr"] = "none"
    """Loss weight by timestep; min_snr (Hang et al. 2023) is for epsilon and v prediction."""
    min_snr_gamma: float = Field(5.0, gt=0)
    """Ignored unless weighting is min_snr."""
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    """Density of the training timesteps; logit_normal (Esser et al. 2024) favours the middle."""
    caption_dropout: float = Field(0.1, ge=0, le=1)
    """Share of samples trained on the empty caption, which guidance needs."""
    clip_norm: float = Field(1.0, ge=0)
    """Global gradient norm above which gradients are scaled down; 0 turns it off."""
    ema_decay: float = Field(0.995, ge=0, lt=1)
    """Decay of the averaged weights that are evaluated and exported; 0 exports the last weights."""
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    eval_every_steps: int = Field(100, ge=1)
    """Steps between validation losses and sample pictures; step 0 and the last step always have them."""
    eval_images: int = Field(256, ge=1)
    """At most so many validation pictures (the first by hash) are measured each time."""
    patience: int = Field(0, ge=0)
    """Stop after so many evaluations without a better validation loss; 0 never stops early."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Key of every random draw: order, noise, timesteps, dropout, new adapters."""
    replay_of: str = ""
    """Dataset version whose pictures count as old; the run trains on the others, the new ones. Empty: on all alike."""
    replay_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of every global batch drawn from the old training pictures; needs replay_of."""
    average_with_base: float = Field(0.0, ge=0, lt=1)
    """Share of the base's weights in those that are evaluated and exported; 0: none. Not for lora:R."""

    @model_validator(mode="after")
    def _known_plan(self) -> "TrainSection":
        name, _ = check_plan_name(self.freezing)
        if self.replay_fraction and not self.replay_of:
            raise ValueError(
                f"train.replay_fraction={self.replay_fraction:g} expected train.replay_of to name the dataset version"
                " whose pictures are old, found none; set it, or train.replay_fraction=0"
            )
        if self.average_with_base and name == "lora":
            raise ValueError(
                f"train.average_with_base={self.average_with_base:g} expected a plan that trains the model's own"
                f" weights, found {self.freezing}: averaged adapters are not the average of two models; set it to 0"
            )
        return self


class EvaluateSection(Section):
    prompts: int = Field(64, ge=2)
    """Test captions drawn for the picture metrics (one picture each)."""
    seeds_per_prompt: int = Field(2, ge=1, le=64)
    """Pictures of one prompt that its diversity is measured on; 1 leaves diversity out."""
    diversity_prompts: int = Field(16, ge=0)
    """The first so many prompts are drawn from every seed, the others once."""
    classes: tuple[str, ...] = ()
    """Texts that the Inception Score sorts pictures by, such as "a photo of a cat"; empty: it is not measured."""
    sampling_steps: int = Field(20, ge=1)
    guidance_scale: float = Field(3.0, ge=0)
    seed: int = Field(0, ge=0, lt=2**62)
    """Seed of the first picture; picture i uses seed + i."""
    bootstrap: int = Field(1000, ge=100)
    """Resamples behind every bootstrap interval."""

    @field_validator("classes")
    @classmethod
    def _enough_classes(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        if len(classes) == 1 or len(set(classes)) < len(classes):
            raise ValueError("expected none, or at least 2 different texts")
        return classes


class GateSection(Section):
    """When a candidate replaces the champion; never part of a run's fingerprint. Shares are of the champion's loss."""

    significance: float = Field(0.05, gt=0, lt=0.5)
    """Chance of each check to pass a model that should not (one-sided)."""
    power: float = Field(0.8, gt=0.5, lt=1)
    """Chance of finding what is there, behind every "so many pictures would decide"."""
    min_improvement: float = Field(0.01, ge=0, lt=1)
    """Share by which the loss on the new data must be lower, beyond doubt; smaller gains are not worth a swap."""
    seed_spread: float = Field(0.03, ge=0, lt=1)
    """Standard deviation, as a share, of the loss between seeds of one recipe: `make bench-gate` measures it."""
    max_forgetting: float = Field(0.05, ge=0)
    """Share by which the loss on the champion's own test pictures may be higher."""
    max_clip_drop: float = Field(1.0, ge=0)
    """Points (of 100) by which the CLIP score may be lower, on new prompts and on anchor prompts."""
    max_coverage_drop: float = Field(0.2, ge=0, le=1)
    """Points by which coverage (a share of the test pictures) may be lower."""
    min_test_pictures: int = Field(20, ge=2)
    """Fewer test pictures decide nothing; the standing loop does not train before so many new ones are there."""
    time_budget_s: float = Field(30.0, gt=0)
    """Seconds in which the candidate must answer the gate's prompts over HTTP, after it is ready."""
    anchor_prompts: tuple[str, ...] = ()
    """Prompts every candidate draws, whatever its data; empty: the first test captions of version 1's data."""
    keep_versions: int = Field(5, ge=0)
    """Versions besides champion and previous that retention keeps; older ones are marked as retired."""
    delete_retired: bool = False
    """Delete the weights and checkpoints of retired versions; without it nothing is ever deleted."""


def check_plan_name(plan: str) -> tuple[str, int | None]:
    """Split a freezing plan into its name and number, e.g. `lora:8` -> ("lora", 8); ValueError lists the names."""
    name, _, number = plan.partition(":")
    numbered = name in ("text_encoder_top", "lora")
    if name in ("denoiser", "denoiser_attention", "text_encoder", "all") and not number:
        return name, None
    if numbered and number.isdigit() and int(number) >= 1:
        return name, int(number)
    raise ValueError(f"freezing plan expected to be one of {', '.join(PLANS)} (K, R >= 1), found {plan!r}")


def trains_text(plan: str) -> bool:
    """Whether a plan trains the text encoder, so that cached text states must not be read."""
    return check_plan_name(plan)[0] in ("text_encoder", "text_encoder_top", "all")
