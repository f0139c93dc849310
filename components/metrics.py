"""How good is a model? Numbers with an interval and the number of items behind each.

Every metric is a pure function of arrays and returns an `Estimate`; nothing here draws pictures or reads a data set. A
number whose uncertainty cannot be told (a single item, an empty set) is refused instead of being reported bare.
Sources: BCa bootstrap (Efron 1987), CLIPScore (Hessel et al. 2021), KID (Binkowski et al. 2018, section 4), score
interval (Wilson 1927). Shape letters: N items, D feature width, B batch, C channels, H height, W width, L tokens.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import special, stats

from components.errors import InputError, NonFiniteError

if TYPE_CHECKING:
    import torch

Array = NDArray[np.float64]
FINGERPRINTED_SUFFIXES = (".json", ".txt", ".safetensors")


@dataclass(frozen=True)
class Estimate:
    """A measured value with its interval and the number of items it rests on."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | int]:
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def mean_with_bootstrap(per_item: Any, seed: int, resamples: int = 1000, confidence: float = 0.95) -> Estimate:
    """Mean of `per_item` (N,) with the bias-corrected and accelerated (BCa) bootstrap interval over items.

    BCa instead of the plain percentile interval because losses by picture are skewed: it follows the skew, so that
    both ends miss equally often. Items are resampled, so noise within an item counts as part of the item.
    """
    values = np.asarray(per_item, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise InputError(f"an interval needs a list of at least 2 numbers, found shape {values.shape}; add items")
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise NonFiniteError(
            f"expected finite numbers, found {bad} of {len(values)} infinite or NaN; the model that made them is broken"
        )
    mean = float(values.mean())
    generator = np.random.default_rng(seed)
    means = np.array([values[generator.integers(0, len(values), len(values))].mean() for _ in range(resamples)])
    low, high = np.quantile(means, _bca_levels(values, means, confidence))
    return Estimate(mean, float(low), float(high), len(values))


def _bca_levels(values: Array, means: Array, confidence: float) -> Array:
    """The two quantiles of the bootstrap means that BCa reads instead of 2.5 % and 97.5 % (Efron 1987, eq. 2.3)."""
    deviation = values - values.mean()
    spread = float((deviation**2).sum())
    tails = np.array([(1 - confidence) / 2, (1 + confidence) / 2])
    below = float(((means < values.mean()).sum() + (means <= values.mean()).sum()) / (2 * len(means)))
    if spread == 0 or not 0 < below < 1:  # all items equal, or too few resamples to see the bias
        return tails
    bias = special.ndtri(below)
    acceleration = float((deviation**3).sum()) / (6 * spread**1.5)
    z = bias + special.ndtri(tails)
    return np.asarray(special.ndtr(bias + z / (1 - acceleration * z)), dtype=np.float64)


def clip_scores(image_features_ND: Any, text_features_ND: Any) -> Array:
    """100 * max(cosine, 0) of each picture with its own caption, (N,). Hessel et al. scale by 2.5 instead of 100."""
    images, texts = np.asarray(image_features_ND, np.float64), np.asarray(text_features_ND, np.float64)
    if images.shape != texts.shape or images.ndim != 2:
        raise InputError(f"expected one caption for each picture, found features {images.shape} and {texts.shape}")
    norms = np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1)
    return np.asarray(100 * np.maximum((images * texts).sum(axis=1) / norms, 0))


def clip_score(image_features_ND: Any, text_features_ND: Any, seed: int = 0, resamples: int = 1000) -> Estimate:
    """Mean CLIP score in [0, 100] with its bootstrap interval over pictures."""
    return mean_with_bootstrap(clip_scores(image_features_ND, text_features_ND), seed, resamples)


def kid(features_real_ND: Any, features_generated_ND: Any, paired: bool = False, confidence: float = 0.95) -> Estimate:
    """Kernel inception distance: the unbiased MMD^2 under k(x, y) = (x.y / D + 1)^3; around 0, also below, when equal.

    `paired` says that row i of both sets belongs to one caption. Such pairs are more alike than two pictures drawn at
    random and would pull the value below zero, so they are left out (Gretton et al. 2012, lemma 6, eq. 4).
    The kernel expects coordinates of about unit size: multiply L2-normalised features by sqrt(D) first. The interval
    is the delete-one jackknife with Student's t. It is deterministic, and wide rather than narrow when both sets come
    from one distribution (there the statistic is degenerate and the jackknife overstates its variance). `n` is the
    size of the smaller set. Cost: O(N^2) kernel values, held in blocks.
    """
    real, generated = np.asarray(features_real_ND, np.float64), np.asarray(features_generated_ND, np.float64)
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise InputError(f"expected two sets of features of one width, found {real.shape} and {generated.shape}")
    m, n = len(real), len(generated)
    if min(m, n) < 3 or (paired and m != n):
        wanted = "as many pictures on both sides" if paired and m != n else "at least 3 pictures on each side"
        raise InputError(f"KID with an interval expects {wanted}, found {m} and {n}")
    within_real = _kernel_sums(real, real) - _kernel(real, real)
    within_generated = _kernel_sums(generated, generated) - _kernel(generated, generated)
    across_real, across_generated = _kernel_sums(real, generated), _kernel_sums(generated, real)
    if paired:
        same_caption = _kernel(real, generated)
        contrast = within_real + within_generated - across_real - across_generated + 2 * same_caption
        value, fewer = _mean_of_pairs(contrast)
        variance = (n - 1) * fewer.var()
    else:
        mean_real, fewer_real = _mean_of_pairs(within_real)
        mean_generated, fewer_generated = _mean_of_pairs(within_generated)
        total = across_real.sum()
        value = mean_real + mean_generated - 2 * total / (m * n)
        fewer_real = fewer_real + mean_generated - 2 * (total - across_real) / ((m - 1) * n)
        fewer_generated = fewer_generated + mean_real - 2 * (total - across_generated) / ((n - 1) * m)
        variance = (m - 1) * fewer_real.var() + (n - 1) * fewer_generated.var()
    half = float(np.sqrt(variance) * stats.t.ppf((1 + confidence) / 2, min(m, n) - 1))
    return Estimate(value, value - half, value + half, min(m, n))


def _mean_of_pairs(sums_N: Array) -> tuple[float, Array]:
    """From each item's sum over its partners: the mean over all pairs, and that mean without each item, (N,)."""
    n, total = len(sums_N), sums_N.sum()
    return float(total / (n * (n - 1))), (total - 2 * sums_N) / ((n - 1) * (n - 2))


def _kernel_sums(x_ND: Array, y_ND: Array, block_rows: int = 1024) -> Array:
    """For each row of x the sum of k(x, y) over all rows of y."""
    width = x_ND.shape[1]
    starts = range(0, len(x_ND), block_rows)
    return np.concatenate([((x_ND[i : i + block_rows] @ y_ND.T / width + 1) ** 3).sum(axis=1) for i in starts])


def _kernel(x_ND: Array, y_ND: Array) -> Array:
    """k of row i of x with row i of y."""
    return np.asarray(((x_ND * y_ND).sum(axis=1) / x_ND.shape[1] + 1) ** 3)


def proportion_wilson(successes: int, n: int, confidence: float = 0.95) -> Estimate:
    """Share of successes with Wilson's score interval, which stays within [0, 1] and is honest at 0 and at n."""
    if n < 1 or not 0 <= successes <= n:
        raise InputError(f"expected 0 <= successes <= n and n >= 1, found {successes} of {n}")
    z = float(special.ndtri((1 + confidence) / 2))
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * float(np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)))
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Estimate(share, low, high, n)


class ClipEncoder:
    """Pictures and texts as L2-normalised rows, by any local `transformers` CLIP directory (CLIPModel, CLIPTokenizer).

    Preprocessing is Pillow's, read from preprocessor_config.json: torchvision is not needed. `identity` (12 hex digits)
    changes with the weights, the tokenizer and the preprocessing; it belongs into the fingerprint of what was measured.
    """

    def __init__(self, directory: Path | str, batch_size: int = 64):
        import torch
        from transformers import CLIPModel, CLIPTokenizer

        self.directory = Path(directory)
        if not (self.directory / "config.json").is_file():
            raise InputError(
                f"expected a CLIP directory with a config.json, found none in {directory}; check model.clip"
            )
        settings = json.loads((self.directory / "config.json").read_text())
        if settings.get("model_type") != "clip":
            raise InputError(
                f"expected a CLIP directory, found model_type {settings.get('model_type')!r} in"
                f" {directory}/config.json; set model.clip to a directory saved from transformers' CLIPModel"
            )
        self.identity = _directory_fingerprint(self.directory)
        self.batch_size = batch_size
        # fp32 whatever was stored: half precision is slow on CPU and rounds the cosines that are compared
        self.model = CLIPModel.from_pretrained(self.directory, dtype=torch.float32, local_files_only=True).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(self.directory, local_files_only=True)
        self.preprocessing = _read_preprocessing(self.directory)
        end = self.model.config.text_config.eos_token_id
        # 2 is the value of old configs, for which transformers pools at the highest token id instead
        if end != 2 and end != self.tokenizer.eos_token_id:
            raise InputError(
                f"expected text_config.eos_token_id {self.tokenizer.eos_token_id} (the tokenizer's), found {end} in "
                f"{directory}/config.json; texts would be read at the wrong token"
            )

    def images(self, pictures: list[Image.Image]) -> NDArray[np.float32]:
        """Features (N, D) of the pictures, in order."""
        import torch

        rows = []
        for i in range(0, len(pictures), self.batch_size):
            pixels_BCHW = np.stack([self.preprocessing(picture) for picture in pictures[i : i + self.batch_size]])
            with torch.inference_mode():
                rows.append(self.model.get_image_features(torch.from_numpy(pixels_BCHW)).pooler_output)
        return self._normalised(rows)

    def texts(self, texts: list[str]) -> NDArray[np.float32]:
        """Features (N, D) of the texts, in order; what exceeds the model's context is cut off."""
        import torch

        rows = []
        context = self.model.config.text_config.max_position_embeddings
        for i in range(0, len(texts), self.batch_size):
            batch = texts[i : i + self.batch_size]
            tokens = self.tokenizer(batch, padding=True, truncation=True, max_length=context, return_tensors="pt")
            with torch.inference_mode():
                rows.append(self.model.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output)
        return self._normalised(rows)

    def _normalised(self, rows: "list[torch.Tensor]") -> NDArray[np.float32]:
        import torch

        if not rows:
            return np.zeros((0, self.model.config.projection_dim), np.float32)
        features = torch.nn.functional.normalize(torch.cat(rows), dim=1).numpy()
        if not np.isfinite(features).all():
            raise NonFiniteError(
                f"expected finite features, found NaN or infinity; the weights in {self.directory} are broken"
            )
        return np.asarray(features, np.float32)


@dataclass(frozen=True)
class Preprocessing:
    """Picture -> array (C, H, W): shorter side to `resize_px`, centre crop to `crop_px`, then (x - mean) / std."""

    resize_px: int
    crop_px: int
    resample: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, picture: Image.Image) -> NDArray[np.float32]:
        picture = picture.convert("RGB")
        short = min(picture.size)
        width, height = (side * self.resize_px // short for side in picture.size)
        if (width, height) != picture.size:
            picture = picture.resize((width, height), Image.Resampling(self.resample))
        left, top = (width - self.crop_px) // 2, (height - self.crop_px) // 2
        picture = picture.crop((left, top, left + self.crop_px, top + self.crop_px))
        pixels_HWC = (np.asarray(picture, np.float32) / 255 - np.array(self.mean)) / np.array(self.std)
        return np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1), dtype=np.float32)


def _read_preprocessing(directory: Path) -> Preprocessing:
    path = directory / "preprocessor_config.json"
    if not path.is_file():
        raise InputError(
            f"expected {path} (how pictures are prepared), found none; save the processor beside the model"
        )
    settings = json.loads(path.read_text())
    crop_px = _side(settings["crop_size"])
    return Preprocessing(
        _side(settings["size"]),
        crop_px,
        settings["resample"],
        tuple(settings["image_mean"]),
        tuple(settings["image_std"]),
    )


def _side(size: int | dict[str, int]) -> int:
    """The files in the wild say 224, {"shortest_edge": 224} or {"height": 224, "width": 224}."""
    return size if isinstance(size, int) else next(iter(size.values()))


def _directory_fingerprint(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix in FINGERPRINTED_SUFFIXES:
            with path.open("rb") as file:
                digest.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]
