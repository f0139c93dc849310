"""How far are two sets of pictures apart? Two unbiased squared maximum mean discrepancies over encoder features.

KID (Binkowski et al. 2018) has the kernel (x.y / D + 1)^3. CMMD (Jayasumana et al. 2024) has the Gaussian kernel of
width 10 on rows of unit length, times 1000; its reference code keeps the diagonal and is biased upwards, this is the
unbiased form. On unit rows that kernel is nearly linear: CMMD sees a moved mean and is blind to lost variety, so it
stands beside coverage. Both are around 0, also below, when nothing tells the sets apart.
Shape letters: N, M items, D feature width.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from components.errors import InputError
from components.metrics import Array, Estimate, LeftOut

Kernel = Callable[[Array, Array, Array], Array]
"""(dot products, squared norms of x, squared norms of y), which broadcast -> kernel values."""

CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
BLOCK_ROWS = 1024


def kid(features_real_ND: Any, features_generated_ND: Any, paired: bool = False, confidence: float = 0.95) -> Estimate:
    """Kernel inception distance with its jackknife interval.

    The kernel expects coordinates of about unit size: multiply L2-normalised features by sqrt(D) first.
    """
    return kid_left_out(features_real_ND, features_generated_ND, paired).estimate(confidence=confidence)


def kid_left_out(features_real_ND: Any, features_generated_ND: Any, paired: bool = False) -> LeftOut:
    """KID, and KID without each item."""
    real, generated = _sets("KID", features_real_ND, features_generated_ND, paired)
    width = real.shape[1]
    return _mmd_left_out(real, generated, lambda dots, _x, _y: (dots / width + 1) ** 3, paired)


def cmmd(features_real_ND: Any, features_generated_ND: Any, paired: bool = False, confidence: float = 0.95) -> Estimate:
    """CLIP maximum mean discrepancy of unit rows, sigma 10, times 1000, with its jackknife interval."""
    return cmmd_left_out(features_real_ND, features_generated_ND, paired).estimate(confidence=confidence)


def cmmd_left_out(features_real_ND: Any, features_generated_ND: Any, paired: bool = False) -> LeftOut:
    """CMMD, and CMMD without each item."""
    real, generated = _sets("CMMD", features_real_ND, features_generated_ND, paired)
    if not all(np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3) for rows in (real, generated)):
        raise InputError("CMMD expects features of unit length, found others; divide each row by its norm")

    def gaussian(dots: Array, squares_x: Array, squares_y: Array) -> Array:
        return np.asarray(np.exp(-(squares_x + squares_y - 2 * dots) / (2 * CMMD_SIGMA**2)))

    found = _mmd_left_out(real, generated, gaussian, paired)
    return LeftOut(CMMD_SCALE * found.value, tuple(CMMD_SCALE * values for values in found.without), found.n)


def _sets(name: str, real: Any, generated: Any, paired: bool) -> tuple[Array, Array]:
    real, generated = np.asarray(real, np.float64), np.asarray(generated, np.float64)
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise InputError(f"expected two sets of features of one width, found {real.shape} and {generated.shape}")
    m, n = len(real), len(generated)
    if min(m, n) < 3 or (paired and m != n):
        wanted = "as many pictures on both sides" if paired and m != n else "at least 3 pictures on each side"
        raise InputError(f"{name} with an interval expects {wanted}, found {m} and {n}")
    return real, generated


def _mmd_left_out(real: Array, generated: Array, kernel: Kernel, paired: bool) -> LeftOut:
    """The unbiased MMD^2, also without each item; O(N^2) kernel values, held in blocks.

    `paired` says that row i of both sets belongs to one caption. Such pairs are more alike than two pictures drawn at
    random and would pull the value below zero, so they are left out (Gretton et al. 2012, lemma 6, eq. 4).
    """
    m, n = len(real), len(generated)
    within_real = _sums(real, real, kernel) - _matched(real, real, kernel)
    within_generated = _sums(generated, generated, kernel) - _matched(generated, generated, kernel)
    across_real, across_generated = _sums(real, generated, kernel), _sums(generated, real, kernel)
    if paired:
        same_caption = _matched(real, generated, kernel)
        contrast = within_real + within_generated - across_real - across_generated + 2 * same_caption
        value, fewer = _mean_of_pairs(contrast)
        return LeftOut(value, (fewer,), n)
    mean_real, fewer_real = _mean_of_pairs(within_real)
    mean_generated, fewer_generated = _mean_of_pairs(within_generated)
    total = across_real.sum()
    value = mean_real + mean_generated - 2 * total / (m * n)
    fewer_real = fewer_real + mean_generated - 2 * (total - across_real) / ((m - 1) * n)
    fewer_generated = fewer_generated + mean_real - 2 * (total - across_generated) / ((n - 1) * m)
    return LeftOut(value, (fewer_real, fewer_generated), min(m, n))


def _mean_of_pairs(sums_N: Array) -> tuple[float, Array]:
    """From each item's sum over its partners: the mean over all pairs, and that mean without each item, (N,)."""
    n, total = len(sums_N), sums_N.sum()
    return float(total / (n * (n - 1))), (total - 2 * sums_N) / ((n - 1) * (n - 2))


def _sums(x_ND: Array, y_MD: Array, kernel: Kernel) -> Array:
    """For each row of x the sum of k(x, y) over all rows of y."""
    squares_x, squares_y = (x_ND**2).sum(axis=1), (y_MD**2).sum(axis=1)
    blocks = [slice(start, start + BLOCK_ROWS) for start in range(0, len(x_ND), BLOCK_ROWS)]
    return np.concatenate(
        [kernel(x_ND[rows] @ y_MD.T, squares_x[rows, None], squares_y[None]).sum(axis=1) for rows in blocks]
    )


def _matched(x_ND: Array, y_ND: Array, kernel: Kernel) -> Array:
    """k of row i of x with row i of y."""
    return kernel((x_ND * y_ND).sum(axis=1), (x_ND**2).sum(axis=1), (y_ND**2).sum(axis=1))
