"""What is measured of a model on a test split, and how a model differs from the one it came from.

A `Scorecard` holds an estimate for every metric that could be measured and the reason for every one that could not;
nothing is reported without an interval. Differences are paired: same pictures and noise, same prompts and seeds.
Shape letters: N test pictures, K timestep bands, P prompts, D feature width.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from components.metrics import Estimate, clip_scores, kid, mean_with_bootstrap, proportion_wilson

LOSS, BAND, CLIP, KID, ADHERENCE = "denoising_loss", "denoising_loss_band_", "clip_score", "kid", "prompt_adherence"
LOWER_IS_BETTER = (LOSS, KID)
TITLES = {LOSS: "Denoising loss", CLIP: "CLIP score", KID: "KID", ADHERENCE: "Prompt adherence"}
NOTES = {
    LOSS: "squared error of the prediction, all timesteps",
    CLIP: "100 × cosine of picture and prompt",
    KID: "distance from the test pictures",
    ADHERENCE: "share of pictures that show all their prompt says",
}
EXPLANATIONS = {
    LOSS: "Every test picture is noised at one timestep in each of four bands and the denoiser predicts. Timestep and"
    " noise are a function of the picture's bytes: every model gets the same. Interval: BCa bootstrap over pictures.",
    CLIP: "Cosine between a drawn picture and its prompt in the encoder's space, times 100, negative values as 0"
    " (Hessel et al. 2021). Comparable only under one encoder. Interval: BCa bootstrap over pictures.",
    KID: "Unbiased squared maximum mean discrepancy between features of drawn and of real test pictures, cubic kernel"
    " (Binkowski et al. 2018), without the pairs that share a caption. Around 0, also slightly below, when nothing"
    " tells them apart. Interval: jackknife.",
    ADHERENCE: "Captions of the built-in data can be checked exactly: a reader tells size, colour, shape, background,"
    " count and position from the pixels, and all must agree. Interval: Wilson.",
}


@dataclass(frozen=True)
class Measurement:
    """What one model did on the test split, before any averaging."""

    losses_NK: NDArray[np.float64]
    features_PD: NDArray[np.float32]  # of the drawn pictures, L2-normalised
    shows_P: NDArray[np.float64]  # 1 shows its prompt, 0 does not, NaN where the prompt cannot be checked


@dataclass(frozen=True)
class Reference:
    """What the models are measured against."""

    text_features_PD: NDArray[np.float32]
    real_features_PD: NDArray[np.float32]  # the test pictures that the prompts caption
    seed: int
    resamples: int


@dataclass(frozen=True)
class Scorecard:
    estimates: Mapping[str, Estimate]
    not_measured: Mapping[str, str]  # metric -> why

    def as_dict(self) -> dict[str, dict[str, float | int]]:
        return {name: estimate.as_dict() for name, estimate in self.estimates.items()}


def make_scorecard(model: Measurement, reference: Reference) -> Scorecard:
    """Average a measurement; deterministic for the reference's seed."""
    found: dict[str, Estimate] = {}
    missing: dict[str, str] = {}
    num_pictures, num_bands = model.losses_NK.shape
    num_prompts = len(model.features_PD)
    if num_pictures >= 2:
        found[LOSS] = _mean(model.losses_NK.mean(axis=1), reference)
        for band in range(num_bands):
            found[f"{BAND}{band}"] = _mean(model.losses_NK[:, band], reference)
    else:
        missing[LOSS] = f"an interval needs 2 test pictures, there is {num_pictures}"
    if num_prompts >= 2:
        found[CLIP] = _mean(clip_scores(model.features_PD, reference.text_features_PD), reference)
    else:
        missing[CLIP] = f"an interval needs 2 prompts, there is {num_prompts}"
    if num_prompts >= 3:
        # sqrt(D) gives the normalised features unit coordinates: the kernel then sees cosines, not cosines / D
        unit = model.features_PD.shape[1] ** 0.5
        found[KID] = kid(reference.real_features_PD * unit, model.features_PD * unit, paired=True)
    else:
        missing[KID] = f"it needs 3 pictures on each side, there are {num_prompts}"
    checkable = model.shows_P[~np.isnan(model.shows_P)]
    if len(checkable):
        found[ADHERENCE] = proportion_wilson(int(checkable.sum()), len(checkable))
    else:
        missing[ADHERENCE] = "no caption can be checked from pixels (only those of the built-in data can)"
    return Scorecard(found, missing)


def paired_change(
    model: Measurement, base: Measurement, reference: Reference, same_latents: bool
) -> dict[str, Estimate]:
    """Model minus base by item, for the metrics that are means over items; no loss where the latents differ."""
    change: dict[str, Estimate] = {}
    if same_latents and len(model.losses_NK) >= 2:
        difference_NK = model.losses_NK - base.losses_NK
        change[LOSS] = _mean(difference_NK.mean(axis=1), reference)
        for band in range(difference_NK.shape[1]):
            change[f"{BAND}{band}"] = _mean(difference_NK[:, band], reference)
    if len(model.features_PD) >= 2:
        scores, before = (clip_scores(each.features_PD, reference.text_features_PD) for each in (model, base))
        change[CLIP] = _mean(scores - before, reference)
    shown = (model.shows_P - base.shows_P)[~np.isnan(model.shows_P)]
    if len(shown) >= 2:
        change[ADHERENCE] = _mean(shown, reference)
    return change


def _mean(per_item: NDArray[np.float64], reference: Reference) -> Estimate:
    return mean_with_bootstrap(per_item, reference.seed, reference.resamples)
