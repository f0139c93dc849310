"""Named complete configs, as functions: copy one, change a field, and it is a new preset."""

from collections.abc import Callable

from cluster.placement import PlacementSection
from components.recipe import DataSection, LearningRate, ModelSection, TrainSection
from components.search_space import SearchSection
from flows.config import Config


def tiny_cpu() -> Config:
    """One laptop without a GPU: the embedded base learns the built-in drifted world; 2 workers, ZeRO 2."""
    return Config(
        train=TrainSection(
            steps=900,
            # New words need their embeddings moved, and a model this small bears it.
            learning_rate=LearningRate(denoiser=2e-3, text_encoder=1e-3),
            eval_every_steps=75,
        ),
        search=SearchSection(
            trials=6,
            random_trials=2,
            grace_steps=75,
            reduction_factor=4,  # rungs at 75 and 300 steps: six trials in minutes
            space={
                "train.freezing": {"choice": ["denoiser", "denoiser_attention", "all", "lora:8"]},
                "train.learning_rate.denoiser": {"loguniform": [3e-4, 1e-2]},
                "train.learning_rate.text_encoder": {"loguniform": [1e-4, 1e-2]},
            },
        ),
        placement=PlacementSection(workers=2, zero_stage=2),
    )


def emblems_base() -> Config:
    """How the embedded base itself was trained, after `fresco pretrain` made its autoencoder and tokenizer."""
    return Config(
        name="fresco-tiny",
        data=DataSection(source="emblems://base?count=16000&seed=0", validation_fraction=0.02, test_fraction=0.02),
        model=ModelSection(base="build/pretrained/pipeline"),
        train=TrainSection(
            steps=3500,
            global_batch=64,
            freezing="all",
            learning_rate=LearningRate(denoiser=2e-3, text_encoder=1e-3),
            warmup_steps=100,
            ema_decay=0.998,
            eval_every_steps=500,
        ),
        placement=PlacementSection(workers=2, zero_stage=1, checkpoint_every_steps=500),
    )


def sd15_gpu() -> Config:
    """A Stable Diffusion 1.5 directory on GPUs: attention layers and 512 px, bf16; set model.base and data.source."""
    return Config(
        data=DataSection(source="./captioned-images", resolution_px=512, min_side_px=256),
        model=ModelSection(base="./stable-diffusion-v1-5"),
        train=TrainSection(
            steps=5000,
            global_batch=64,
            freezing="denoiser_attention",
            learning_rate=LearningRate(denoiser=1e-5, text_encoder=1e-6),
            warmup_steps=200,
            weighting="min_snr",
            precision="bf16",
            gradient_checkpointing=True,
            ema_decay=0.9999,
            eval_every_steps=500,
        ),
        placement=PlacementSection(workers=4, gpus_per_worker=1, micro_batch=4, checkpoint_every_steps=500),
    )


def z_image_gpu() -> Config:
    """A Z-Image directory (Qwen3 + single-stream transformer) on GPUs: LoRA, ZeRO 3, 512 px, bf16."""
    return Config(
        data=DataSection(source="./captioned-images", resolution_px=512, min_side_px=256),
        model=ModelSection(base="./z-image"),
        train=TrainSection(
            steps=2000,
            global_batch=32,
            freezing="lora:16",
            learning_rate=LearningRate(denoiser=1e-4, text_encoder=0.0),
            timestep_sampling="logit_normal",
            warmup_steps=100,
            precision="bf16",
            gradient_checkpointing=True,
            eval_every_steps=250,
        ),
        placement=PlacementSection(workers=8, gpus_per_worker=1, zero_stage=3, micro_batch=1),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    preset.__name__: preset for preset in (tiny_cpu, emblems_base, sd15_gpu, z_image_gpu)
}
