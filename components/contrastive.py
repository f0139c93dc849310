"""How does a picture-and-text encoder small enough to commit come about? By the contrastive loop below.

Symmetric InfoNCE over a batch (Radford et al. 2021, figure 3) with one change: pictures whose captions are word for
word the same are positives of each other, each sharing the target evenly (Yang et al. 2022, UniCL, eq. 3); with a
drawn grammar such twins are common and would otherwise be pushed apart. The result is an ordinary `transformers` CLIP
directory. Shape letters: B batch, C channels, H height, W width, L tokens, D projection width.
"""

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from components.emblems import POSITIONS, SIZES, Emblem, caption_of, draw, rng_at, sample_emblem, world_named
from components.errors import NonFiniteError

CONTEXT_TOKENS = 32
IMAGE_PX, PATCH_PX, VISION_WIDTH = 64, 8, 128
MAX_LOGIT_SCALE = math.log(100)  # Radford et al.: cosines are multiplied by at most 100
SIBLINGS = 4  # emblems in a family: the first and variants that differ from it in one word
PLACE_PERIOD, PLACE_STRENGTH = 20.0, 0.2
REPORT_EVERY_STEPS = 100
HELD_OUT_BATCHES = 8
LEGACY_EOS = 2  # a text config with this eos_token_id is pooled at its highest token id by transformers

PictureBatch = tuple[Tensor, list[str]]  # pixels_BCHW in [-1, 1] and their captions


@dataclass(frozen=True)
class ContrastivePlan:
    """How long and how fast."""

    steps: int
    learning_rate: float = 1e-3  # peak; linear warm-up, then cosine to zero
    warmup_steps: int = 50
    weight_decay: float = 0.1  # matrices only
    clip_norm: float = 1.0


@dataclass(frozen=True)
class ContrastiveStep:
    """What one step saw, before its update."""

    step: int
    loss: float
    accuracy: float  # share of pictures and captions whose nearest partner in the batch is a true one


def make_tiny_clip(tokenizer: CLIPTokenizer, seed: int) -> CLIPModel:
    """A fresh CLIP for 64 px pictures, 0.83 M parameters at 1,400 tokens; the caller's random state is left alone."""
    if tokenizer.eos_token_id == LEGACY_EOS:
        raise ValueError(
            "expected the tokenizer's end token at another id than 2, which transformers reads as a legacy CLIP"
        )
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT_TOKENS,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vision = CLIPVisionConfig(
        image_size=IMAGE_PX,
        patch_size=PATCH_PX,
        hidden_size=VISION_WIDTH,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(config)
    with torch.no_grad():
        positions = model.vision_model.embeddings.position_embedding.weight
        positions[1:] = _patch_places(IMAGE_PX // PATCH_PX, VISION_WIDTH)  # row 0: class token
    return model


def _patch_places(side: int, width: int) -> Tensor:
    """Sines and cosines of each patch's row and column, (side * side, width), as strong as the patches themselves.

    transformers starts positions ten times weaker than patches, and the network is slow to find out where things are:
    of five places it told 71 % right after 1,500 steps, and with these 95 % after 500.
    """
    rates = PLACE_PERIOD ** -(torch.arange(width // 4) / (width // 4))
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [place.flatten()[:, None] * rates for place in (row, column)]
    return PLACE_STRENGTH * torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


def contrastive_loss(
    image_BD: Tensor, text_BD: Tensor, captions: list[str], logit_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss and matching accuracy of a batch of L2-normalised features; equal captions are positives of each other."""
    places = {caption: place for place, caption in enumerate(captions)}
    identity_B = torch.tensor([places[caption] for caption in captions], device=image_BD.device)
    same_BB = identity_B[:, None] == identity_B[None, :]
    target_BB = same_BB / same_BB.sum(dim=1, keepdim=True)
    logits_BB = logit_scale.exp() * image_BD @ text_BD.T
    by_image = functional.cross_entropy(logits_BB, target_BB)
    by_text = functional.cross_entropy(logits_BB.T, target_BB)
    found = same_BB.gather(1, logits_BB.argmax(dim=1)[:, None]), same_BB.gather(1, logits_BB.argmax(dim=0)[:, None])
    return (by_image + by_text) / 2, torch.cat(found).float().mean()


def train_clip(
    model: CLIPModel,
    tokenizer: CLIPTokenizer,
    batches: Iterator[PictureBatch],
    plan: ContrastivePlan,
    on_step: Callable[[ContrastiveStep], None] | None = None,
) -> list[ContrastiveStep]:
    """Train `model` in place on the first `plan.steps` batches; NonFiniteError before a bad loss moves a weight."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, plan))
    model.train()
    history = []
    for step in range(plan.steps):
        batch = next(batches)
        loss, accuracy = contrastive_loss(*_features(model, tokenizer, batch), batch[1], model.logit_scale)
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"expected a finite contrastive loss, found {loss.item()} at step {step}; lower learning_rate"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        history.append(ContrastiveStep(step, loss.item(), accuracy.item()))
        if on_step is not None:
            on_step(history[-1])
    model.eval()
    return history


def sibling_pairs(worlds: tuple[str, ...], seed: int, index: int, batch_size: int, size_px: int = 64) -> PictureBatch:
    """Batch number `index` of freshly drawn emblems and captions, in families whose members differ in one word.

    Among random emblems size and colours nearly always tell a pair apart, and a network stops there. Siblings that
    differ in one attribute only make it look at shape and position too.
    """
    rng = rng_at(seed, index)
    emblems: list[Emblem] = []
    while len(emblems) < batch_size:
        first = sample_emblem(rng, worlds[int(rng.integers(len(worlds)))])
        emblems += [first, *(_sibling(first, rng) for _ in range(SIBLINGS - 1))]
    emblems = emblems[:batch_size]
    pictures_BHWC = np.stack([np.asarray(draw(emblem, rng, size_px)) for emblem in emblems])
    pixels_BCHW = torch.from_numpy(pictures_BHWC).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels_BCHW, [caption_of(emblem, rng) for emblem in emblems]


def _sibling(emblem: Emblem, rng: np.random.Generator) -> Emblem:
    """The emblem with one attribute drawn anew (now and then it stays the same: then the two are twins)."""
    words = world_named(emblem.world)
    choices = [
        {"size": _pick(rng, SIZES)},
        {"colour": _pick(rng, words.colours)},
        {"shape": _pick(rng, words.shapes)},
        {"background": _pick(rng, words.backgrounds)},
        *([{"position": _pick(rng, POSITIONS)}] if emblem.count == 1 else []),
    ]
    changed: Any = choices[int(rng.integers(len(choices)))]
    return replace(emblem, **changed)


def _pick(rng: np.random.Generator, words: Iterable[str]) -> str:
    options = tuple(words)
    return options[int(rng.integers(len(options)))]


def _rate(step: int, plan: ContrastivePlan) -> float:
    """The share of the peak learning rate at a step."""
    if step < plan.warmup_steps:
        return (step + 1) / plan.warmup_steps
    progress = (step - plan.warmup_steps) / max(1, plan.steps - plan.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def pretrain_clip(
    tokenizer: CLIPTokenizer,
    pairs_at: Callable[[int], PictureBatch],
    steps: int,
    directory: Path,
    say: Callable[[str], None],
) -> float:
    """Make, train and save the tiny CLIP; return its matching accuracy on batches that training has not seen.

    `pairs_at(index)` gives batch number `index`; the batches 0 to steps - 1 train, the following ones measure.
    """
    model = make_tiny_clip(tokenizer, seed=0)

    def on_step(done: ContrastiveStep) -> None:
        if done.step % REPORT_EVERY_STEPS == 0 or done.step == steps - 1:
            say(f"CLIP step {done.step + 1}/{steps} loss {done.loss:.3f} matched {done.accuracy:.2f}")

    train_clip(model, tokenizer, map(pairs_at, range(steps)), ContrastivePlan(steps), on_step)
    accuracy = matching_accuracy(model, tokenizer, map(pairs_at, range(steps, steps + HELD_OUT_BATCHES)))
    say(f"held-out matching accuracy: {accuracy:.3f}")
    save_clip(model, tokenizer, directory)
    return accuracy


@torch.inference_mode()
def matching_accuracy(model: CLIPModel, tokenizer: CLIPTokenizer, batches: Iterator[PictureBatch]) -> float:
    """Share of pictures and captions whose nearest partner in their batch is a true one, mean over batches."""
    found = [contrastive_loss(*_features(model, tokenizer, batch), batch[1], model.logit_scale)[1] for batch in batches]
    return float(torch.stack(found).mean())


def _features(model: CLIPModel, tokenizer: CLIPTokenizer, batch: PictureBatch) -> tuple[Tensor, Tensor]:
    """L2-normalised image_BD and text_BD."""
    pixels_BCHW, captions = batch
    tokens = tokenizer(captions, padding=True, truncation=True, max_length=CONTEXT_TOKENS, return_tensors="pt")
    image_BD = model.get_image_features(pixels_BCHW).pooler_output
    text_BD = model.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output
    return functional.normalize(image_BD, dim=1), functional.normalize(text_BD, dim=1)


def save_clip(model: CLIPModel, tokenizer: CLIPTokenizer, directory: Path) -> None:
    """Write a CLIP directory with fp16 weights, tokenizer and preprocessing; `model` itself keeps its precision."""
    copy.deepcopy(model).half().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    vision: Any = model.config.vision_config
    side = vision.image_size
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],  # pixels in [-1, 1], as everywhere in Fresco
        "image_std": [0.5, 0.5, 0.5],
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n")
