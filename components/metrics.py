"""How good is a model, where every item has a number of its own? Means and shares with an interval and a count.

Every metric is a pure function of arrays and returns an `Estimate`; nothing here draws pictures or reads a data set. A
number whose uncertainty cannot be told (a single item, an empty set) is refused instead of being reported bare.
What belongs to a set as a whole (KID, FID, coverage) is in `set_metrics.py`.
Sources: BCa bootstrap (Efron 1987), jackknife (Tukey 1958), CLIPScore (Hessel et al. 2021), score interval (Wilson
1927). Shape letters: N items, D feature width, P prompts, S seeds.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from components.errors import InputError, NonFiniteError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A measured value with its interval and the number of items it rests on."""

    value: float
    low: float
    high: float
    n: int
    encoder: str = ""
    """Identity of the encoder the value depends on; values of two encoders do not compare."""
    warning: str = ""
    """Why the value is not to be trusted, where there is a reason."""

    def as_dict(self) -> dict[str, float | int | str]:
        """The numbers, and encoder and warning where there are any."""
        numbers: dict[str, float | int | str] = {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "n": self.n,
        }
        words = {"encoder": self.encoder, "warning": self.warning}
        return numbers | {name: text for name, text in words.items() if text}


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


def diversity(features_PSD: Any) -> Array:
    """Mean pairwise distance 1 - cosine among the pictures that one prompt gave from S seeds, (P,); rows are unit.

    0 says that the seed changes nothing. More is not better for ever: noise is diverse as well.
    """
    features_PSD = np.asarray(features_PSD, np.float64)
    if features_PSD.ndim != 3 or features_PSD.shape[1] < 2:
        raise InputError(f"diversity expects at least 2 seeds of every prompt, found features {features_PSD.shape}")
    seeds = features_PSD.shape[1]
    total_P = (features_PSD.sum(axis=1) ** 2).sum(axis=1) - (features_PSD**2).sum(axis=(1, 2))
    return np.asarray(1 - total_P / (seeds * (seeds - 1)))


def proportion_wilson(successes: int, n: int, confidence: float = 0.95) -> Estimate:
    """Share of successes with Wilson's score interval, which stays within [0, 1] and is honest at 0 and at n."""
    if n < 1 or not 0 <= successes <= n:
        raise InputError(f"expected 0 <= successes <= n and n >= 1, found {successes} of {n}")
    return Estimate(successes / n, *_wilson_ends(successes / n, n, confidence), n)


def _wilson_ends(share: float, n: float, confidence: float) -> tuple[float, float]:
    z = float(special.ndtri((1 + confidence) / 2))
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * float(np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)))
    return 0.0 if share == 0 else centre - half, 1.0 if share == 1 else centre + half


@dataclass(frozen=True)
class LeftOut:
    """A statistic of whole samples with its value without each item: one array for each independent sample."""

    value: float
    without: tuple[Array, ...]
    n: int

    def estimate(self, low: float = -np.inf, high: float = np.inf, confidence: float = 0.95) -> Estimate:
        """The delete-one jackknife interval with Student's t, within what is possible, [low, high].

        Deterministic. Its variance is, in expectation, never too small (Efron & Stein 1981): wide rather than narrow.
        """
        half = self.standard_error * float(stats.t.ppf((1 + confidence) / 2, self.degrees))
        ends = np.clip([self.value - half, self.value + half], low, high)
        return Estimate(self.value, float(ends[0]), float(ends[1]), self.n)

    def share(self, confidence: float = 0.95) -> Estimate:
        """For a statistic in [0, 1]: Wilson's interval at the count whose share would vary as the jackknife says.

        Near 0 and 1 the jackknife has no width, where ignorance has; so that count is `n` at most.
        """
        effective = float(self.n)
        if self.standard_error > 0:
            likely = (self.value * self.n + 2) / (self.n + 4)  # Agresti & Coull: a share of 1 has a variance, too
            effective = min(self.n, max(1.0, likely * (1 - likely) / self.standard_error**2))
        return Estimate(self.value, *_wilson_ends(self.value, effective, confidence), self.n)

    @property
    def standard_error(self) -> float:
        return float(np.sqrt(sum((len(values) - 1) * values.var() for values in self.without)))

    @property
    def degrees(self) -> int:
        return min(len(values) for values in self.without) - 1

    def minus(self, other: "LeftOut") -> "LeftOut":
        """The difference of one statistic between two models measured on the same items."""
        pairs = zip(self.without, other.without, strict=True)
        return LeftOut(self.value - other.value, tuple(mine - theirs for mine, theirs in pairs), min(self.n, other.n))
