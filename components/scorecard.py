"""What is measured of a model on a test split, and how two models differ there.

A `Scorecard` holds an estimate for every metric that could be measured and the reason for every one that could not;
nothing is reported without an interval, and what depends on an encoder names it. Differences are paired: same pictures
and noise, same prompts and seeds. FID and Inception Score are reported and never compared.
Shape letters: N test pictures, K timestep bands, P prompts, Q prompts drawn from S seeds, D feature width, C classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from components.compare import Paired, compare_paired
from components.copies import Nearest, copying, near_copies
from components.kernel_distances import cmmd_left_out, kid_left_out
from components.metrics import (
    Array,
    Estimate,
    LeftOut,
    clip_scores,
    diversity,
    mean_with_bootstrap,
    proportion_wilson,
)
from components.set_metrics import (
    FID_PICTURES,
    FID_WARNING,
    IS_PICTURES,
    IS_WARNING,
    NEIGHBOURS,
    class_probabilities,
    coverage_and_density,
    fid,
    inception_score,
)

LOSS, BAND, SLICE = "denoising_loss", "denoising_loss_band_", "denoising_loss_slice_"
CLIP, KID, CMMD, FID, INCEPTION = "clip_score", "kid", "cmmd", "fid", "inception_score"
COVERAGE, DENSITY, DIVERSITY = "coverage", "density", "prompt_diversity"
COPYING, NEAR_COPIES, ADHERENCE = "copying", "near_copies", "prompt_adherence"
TITLES = {
    LOSS: "Denoising loss",
    CLIP: "CLIP score",
    KID: "KID",
    ADHERENCE: "Prompt adherence",
    CMMD: "CMMD",
    COVERAGE: "Coverage",
    DENSITY: "Density",
    DIVERSITY: "Diversity within a prompt",
    COPYING: "Copying",
    NEAR_COPIES: "Near copies",
    FID: "FID",
    INCEPTION: "Inception Score",
}
LOWER_IS_BETTER = (LOSS, KID, CMMD, FID, NEAR_COPIES)
# Copying: 0.5 is as near as unseen pictures. A model that draws another world has less, and is not better for it.
NEITHER_IS_BETTER = (DENSITY, DIVERSITY, COPYING)
NEED_ENCODER = (CLIP, KID, CMMD, COVERAGE, DENSITY, DIVERSITY, COPYING, NEAR_COPIES, FID, INCEPTION)
SHARES = (COVERAGE, COPYING)
BOUNDS = {DENSITY: (0.0, np.inf), FID: (0.0, np.inf), INCEPTION: (1.0, np.inf)}
WARNINGS = {FID: (FID_PICTURES, FID_WARNING), INCEPTION: (IS_PICTURES, IS_WARNING)}
NOT_COMPARED = (FID, INCEPTION, NEAR_COPIES)
MIN_SET = NEIGHBOURS + 2


@dataclass(frozen=True)
class Measurement:
    """What one model did on the test split, before any averaging."""

    losses_NK: NDArray[np.float64]
    features_PD: NDArray[np.float32]  # of the drawn pictures, L2-normalised
    shows_P: NDArray[np.float64]  # 1 shows its prompt, 0 does not, NaN where the prompt cannot be checked
    features_QSD: NDArray[np.float32] | None = None  # of prompts drawn from several seeds
    nearest: Nearest | None = None  # the training picture nearest to each drawn one


@dataclass(frozen=True)
class Reference:
    """What the models are measured against."""

    text_features_PD: NDArray[np.float32]
    real_features_PD: NDArray[np.float32]  # the test pictures that the prompts caption
    seed: int
    resamples: int
    encoder: str = ""
    slices: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)  # name -> mask of the test pictures
    class_features_CD: NDArray[np.float32] | None = None
    logit_scale: float = 100.0
    unseen: Nearest | None = None  # the training picture nearest to each test picture
    no_copy_check: str = "no training pictures were given"


@dataclass(frozen=True)
class Scorecard:
    estimates: Mapping[str, Estimate]
    not_measured: Mapping[str, str]  # metric -> why

    def as_dict(self) -> dict[str, dict[str, float | int | str]]:
        return {name: estimate.as_dict() for name, estimate in self.estimates.items()}


def make_scorecard(model: Measurement, reference: Reference) -> Scorecard:
    """Average a measurement; deterministic for the reference's seed."""
    found = {
        name: mean_with_bootstrap(values, reference.seed, reference.resamples)
        for name, values in _by_item(model, reference).items()
        if name != ADHERENCE and len(values) >= 2
    }
    checkable = _checkable(model)
    if len(checkable):
        found[ADHERENCE] = proportion_wilson(int(checkable.sum()), len(checkable))
    for name, statistic in _by_set(model, reference).items():
        found[name] = statistic.share() if name in SHARES else statistic.estimate(*BOUNDS.get(name, (-np.inf, np.inf)))
    if model.nearest is not None and reference.unseen is not None and COPYING in found:
        found[NEAR_COPIES] = near_copies(model.nearest, reference.unseen)
    estimates = {name: _told(name, estimate, reference.encoder) for name, estimate in found.items()}
    missing = {name: why for name, why in _reasons(model, reference).items() if name not in estimates}
    return Scorecard(estimates, missing)


def paired_change(model: Measurement, base: Measurement, reference: Reference, same_latents: bool) -> dict[str, Paired]:
    """Model minus base for every metric that compares; no loss where the latents differ."""
    mine, theirs = _by_item(model, reference), _by_item(base, reference)
    change = {}
    for name, values in mine.items():
        if name in theirs and len(values) >= 2 and (same_latents or not name.startswith(LOSS)):
            change[name] = compare_paired(values, theirs[name], reference.seed, reference.resamples)
    before = _by_set(base, reference)
    for name, statistic in _by_set(model, reference).items():
        if name in before and name not in NOT_COMPARED:
            change[name] = _compared(statistic.minus(before[name]))
    return change


def _by_item(model: Measurement, reference: Reference) -> dict[str, Array]:
    """The metrics that every picture or prompt has a number of its own for."""
    losses_N = model.losses_NK.mean(axis=1)
    items = {LOSS: losses_N}
    items |= {f"{BAND}{band}": model.losses_NK[:, band] for band in range(model.losses_NK.shape[1])}
    items |= {slice_key(name): losses_N[mask] for name, mask in reference.slices.items()}
    items[CLIP] = clip_scores(model.features_PD, reference.text_features_PD)
    if model.features_QSD is not None and len(model.features_QSD):
        items[DIVERSITY] = diversity(model.features_QSD)
    items[ADHERENCE] = _checkable(model)
    return items


def _by_set(model: Measurement, reference: Reference) -> dict[str, LeftOut]:
    """The metrics that only the pictures together have, with what they are without each picture."""
    real, drawn = reference.real_features_PD, model.features_PD
    found: dict[str, LeftOut] = {}
    if len(drawn) >= 3:
        # sqrt(D) gives the normalised features unit coordinates: KID's kernel then sees cosines, not cosines / D
        unit = drawn.shape[1] ** 0.5
        found[KID] = kid_left_out(real * unit, drawn * unit, paired=True)
        found[CMMD] = cmmd_left_out(real, drawn, paired=True)
        if len(drawn) >= 4:
            found[FID] = fid(real * unit, drawn * unit, paired=True)
        if reference.class_features_CD is not None:
            shares = class_probabilities(drawn, reference.class_features_CD, reference.logit_scale)
            found[INCEPTION] = inception_score(shares)
        if model.nearest is not None and reference.unseen is not None and len(reference.unseen.distance_N) >= 3:
            found[COPYING] = copying(model.nearest, reference.unseen)
    if len(drawn) >= MIN_SET:
        found[COVERAGE], found[DENSITY] = coverage_and_density(real, drawn, paired=True)
    return found


def slice_key(name: str) -> str:
    """`shape: star` -> `denoising_loss_slice_shape_star`."""
    return SLICE + "_".join("".join(letter if letter.isalnum() else " " for letter in name).split())


def _checkable(model: Measurement) -> Array:
    return model.shows_P[~np.isnan(model.shows_P)]


def _compared(change: LeftOut, confidence: float = 0.95) -> Paired:
    """The difference of two set statistics, its two-sided p-value by Student's t over the left-out values."""
    estimate, error, n = change.estimate(confidence=confidence), change.standard_error, change.n
    if error == 0:
        return Paired(estimate.value, estimate.low, estimate.high, float(estimate.value == 0), n, None)
    p_value = float(2 * stats.t.sf(abs(estimate.value) / error, change.degrees))
    needed = None
    if p_value > 1 - confidence and estimate.value != 0:  # the error falls with the root of the count; power 80 %
        reach = float(special.ndtri((1 + confidence) / 2) + special.ndtri(0.8))
        needed = int(np.ceil(min(1e9, n * (reach * error / estimate.value) ** 2)))
    return Paired(estimate.value, estimate.low, estimate.high, p_value, n, needed)


def _told(name: str, estimate: Estimate, encoder: str) -> Estimate:
    """The estimate with the encoder it depends on, and with a warning where its sample is too small for it."""
    enough, warning = WARNINGS.get(name, (0, ""))
    words: dict[str, Any] = {
        "encoder": encoder if name in NEED_ENCODER else "",
        "warning": warning if estimate.n < enough else "",
    }
    return replace(estimate, **words)


def _reasons(model: Measurement, reference: Reference) -> dict[str, str]:
    """Why each metric would be missing."""
    num_prompts = len(model.features_PD)
    few = f"it needs {{}} pictures on each side, there are {num_prompts}"
    copies = few.format(3) if reference.unseen is not None else reference.no_copy_check
    classes = "no classes given (evaluate.classes)" if reference.class_features_CD is None else few.format(3)
    return {
        LOSS: f"an interval needs 2 test pictures, there is {len(model.losses_NK)}",
        CLIP: f"an interval needs 2 prompts, there is {num_prompts}",
        KID: few.format(3),
        CMMD: few.format(3),
        FID: few.format(4),
        **dict.fromkeys((COVERAGE, DENSITY), few.format(MIN_SET)),
        DIVERSITY: "it needs 2 prompts with 2 seeds each (evaluate.seeds_per_prompt, evaluate.diversity_prompts)",
        **dict.fromkeys((COPYING, NEAR_COPIES), copies),
        INCEPTION: classes,
        ADHERENCE: "no caption can be checked from pixels (only those of the built-in data can)",
    }
