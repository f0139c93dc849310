"""How large is a change that a stream's test has found? Sizes that do not shrink as items grow in number.

Shares of the arrivals for pictures and texts, the share of the agreement for the alignment, and an AUROC for people.
What is significant is `two_sample`'s matter. Shape letters: N pooled items (reference first).
"""

import math
from typing import Any

import numpy as np

from components.domain_classifier import domain_auroc, score_auroc
from components.drift_kernels import agreement
from components.drift_streams import ALIGNMENT, COSINE, Bank, kernel_features
from components.metrics import Estimate
from components.near_duplicates import duplicate_groups
from components.two_sample import TwoSample, mmd2_of_labels, random_labels

SPLITS, SPLIT_QUANTILE = 499, 0.99
SPLIT_STREAM = 41
TINY = 1e-12


def measured_effect(bank: Bank, test: TwoSample, seed: int) -> dict[str, float]:
    """MMD^2 of the strongest kernel, the reference's own when split in halves, and the effect.

    Where a share f of the arrivals is new, MMD = f |mean of the new - mean of the reference|. Kernel values lie in
    [0, 1], so that distance is at most sqrt(1 + E), E the reference's mean kernel value: f is at least MMD over it.
    The cosine's kernel is not bounded: its effect is a difference of means in standard deviations.
    Between halves of h items the null is wider than between n and m: it is scaled by (1/n + 1/m) / (2 / h), to which
    the null's deviation is proportional (Gretton et al. 2012, theorem 12).
    """
    kernel = bank.kernels[test.strongest]
    n, m = bank.num_reference, bank.num_arrivals
    inner = kernel[:n, :n]
    labels = random_labels(np.random.default_rng((seed, SPLIT_STREAM)), SPLITS, n // 2, n)
    split = np.quantile(mmd2_of_labels(inner, labels), SPLIT_QUANTILE, method="higher")
    scale = (1 / n + 1 / m) / (1 / (n // 2) + 1 / (n - n // 2))
    mmd2 = test.mmd2[test.strongest]
    if bank.pairs and test.strongest != COSINE:
        effect = _changed_agreement(bank, test.strongest, mmd2)
    else:
        mean = 0.0 if test.strongest == COSINE else float(agreement(inner).mean())
        effect = math.sqrt(max(0.0, mmd2) / (1 + mean))
    return {"mmd2": mmd2, "split_quantile": float(split) * scale, "effect": effect}


def _changed_agreement(bank: Bank, strongest: str, mmd2: float) -> float:
    """By how much the arrivals' cross-covariance C' differs from the reference's C, whatever noise is around both.

    The mean agreement within a side estimates |C|^2 without bias. Of the agreement it is the difference over the larger
    one; of cross-covariances |C - C'| / sqrt(|C|^2 + |C'|^2).
    """
    ours, theirs = agreements(bank, strongest).values()
    if strongest in bank.pairs:
        return abs(ours - theirs) / max(TINY, abs(ours), abs(theirs))
    return math.sqrt(max(0.0, mmd2) / max(TINY, abs(ours) + abs(theirs)))


def stream_auroc(stream: str, bank: Bank, strongest: str, seed: int) -> Estimate | None:
    n = bank.num_reference
    if stream == ALIGNMENT:
        values = agreement(pair_behind(bank, strongest))
        return score_auroc(values[n:], values[:n])
    features = kernel_features(bank.kernels[strongest])
    if not features.shape[1]:  # all items are equal
        return None
    return domain_auroc(features[:n], features[n:], duplicate_groups(bank.rows_ND), seed)


def agreements(bank: Bank, strongest: str) -> dict[str, float]:
    """How well pictures go with captions on each side: the mean pair kernel off the diagonal, 0 where at random."""
    pair = pair_behind(bank, strongest)
    sides = {"reference": pair[: bank.num_reference, : bank.num_reference]}
    sides["arrivals"] = pair[bank.num_reference :, bank.num_reference :]
    return {f"agreement_{name}": float(agreement(block).mean()) for name, block in sides.items()}


def pair_behind(bank: Bank, kernel: str) -> Any:
    """The pair kernel that a kernel of the alignment is made of; for the cosine the first one."""
    return next((pair for name, pair in bank.pairs.items() if name.startswith(kernel)), next(iter(bank.pairs.values())))
