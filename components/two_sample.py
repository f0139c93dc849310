"""Do two samples come from one distribution? Squared MMDs of a bank of kernels in ONE permutation distribution.

Every statistic is the unbiased squared maximum mean discrepancy (Gretton et al. 2012, JMLR 13, lemma 6). The bank's
statistic is its largest member after each was put on a common scale that depends on the pooled sample alone, as in
MMD-FUSE (Biggs et al. 2023, arXiv 2306.08777; aggregation over widths: Schrab et al. 2023, arXiv 2110.15073). So the
level is exact for any n, any number of kernels and any dependence between them, if the items are exchangeable.
What must not look at which side an item is on: widths, projections, word weights. Take them from the pooled sample.
Shape letters: N pooled items (first sample first), B permutations, K kernels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from components.errors import InputError, NonFiniteError

Matrix = NDArray[np.float32]

PERMUTATIONS = 999
LOOK_CLOSER = 20
"""Where so many of the first permutations reach the data, p is clear enough; else the level decides how many."""
DRAWS_AT_LEVEL = 8
"""At the level itself so many permutations are expected to reach the data: p then errs by about a third of itself."""
BLOCK = 2**22
"""Labels drawn at once: 16 MiB."""
SLACK = 1e-5
"""Equal sums in another order differ by rounding; what is so near, in deviations of the null, counts as reaching."""
FIRST_STREAM, CLOSER_STREAM = 11, 12


@dataclass(frozen=True)
class TwoSample:
    """What the permutations say; statistics by name of the kernel."""

    p_value: float
    """(permutations that reach the data + 1) / (permutations + 1), never 0 (Phipson & Smyth 2010)."""
    permutations: int
    strongest: str
    """The kernel that tells the samples apart best."""
    mmd2: dict[str, float]
    """Unbiased squared MMD, around 0, also below, when nothing tells the samples apart."""
    deviations: dict[str, float]
    """The same in standard deviations of its permutation distribution."""


def permutation_test(
    kernels: Mapping[str, Any], num_first: int, seed: int, level: float, permutations: int = PERMUTATIONS
) -> TwoSample:
    """Test whether rows [:num_first] and [num_first:] of the pooled kernel matrices (N, N) are exchangeable.

    `level` says how small a p-value will be asked for: p-values near it rest on more permutations. That is a second
    test whose result replaces the first one's when that is small, p2 if p1 < c else p1. For a level below c only p2
    can reject, from c upwards only p1 can have: both are valid, so what is reported is valid at every level.
    """
    scaled = {name: _centred(name, kernel, num_first) for name, kernel in kernels.items()}
    if not scaled:
        raise InputError("a two-sample test expects at least one kernel matrix, found none")
    found = _test(scaled, num_first, np.random.default_rng((seed, FIRST_STREAM)), permutations)
    wanted = draws_for(level)
    if wanted > permutations and found.p_value < (LOOK_CLOSER + 1) / (permutations + 1):
        return _test(scaled, num_first, np.random.default_rng((seed, CLOSER_STREAM)), wanted)
    return found


def draws_for(level: float) -> int:
    """Permutations with which a p-value of `level` is told with a relative error of about a third."""
    if not 0 < level < 1:
        raise InputError(f"a test's level is expected in (0, 1), found {level}")
    return max(PERMUTATIONS, math.ceil(DRAWS_AT_LEVEL / level) - 1)


def items_for_level(level: float) -> int:
    """The smallest n for which n against n items can reach p <= `level` at all: there are C(2n, n) ways to split."""
    n = 1
    while 1 / special.comb(2 * n, n) > level:
        n += 1
    return n


def mmd2_of_labels(kernel: Any, first_BN: Any) -> NDArray[np.float64]:
    """The unbiased squared MMD, (B,), for each row of labels: 1 says first sample, 0 second; equal counts a row."""
    kernel, first = np.asarray(kernel, np.float32), np.asarray(first_BN, np.float32)
    diagonal = np.diagonal(kernel).astype(np.float64)
    sums, labels = kernel.sum(axis=1, dtype=np.float64), first.astype(np.float64)
    n = float(labels[0].sum())
    m = labels.shape[1] - n
    within_first = np.einsum("bn,bn->b", first @ kernel, first, dtype=np.float64)
    across = labels @ sums - within_first
    within_second = sums.sum() - 2 * across - within_first
    own_first = labels @ diagonal
    own_second = diagonal.sum() - own_first
    return np.asarray(
        (within_first - own_first) / (n * (n - 1)) + (within_second - own_second) / (m * (m - 1)) - 2 * across / (n * m)
    )


def random_labels(generator: np.random.Generator, rows: int, num_first: int, num_all: int) -> Matrix:
    """Labels (rows, N) of random splits, `num_first` ones in each row."""
    labels = np.zeros((rows, num_all), np.float32)
    labels[:, :num_first] = 1
    return generator.permuted(labels, axis=1, out=labels)


@dataclass(frozen=True)
class _Scaled:
    kernel: Matrix
    spread: float
    """Standard deviation of the statistic under permutation, to leading order."""
    shape: float
    """Of the gamma distribution with the null's skewness."""


def _centred(name: str, kernel: Any, num_first: int) -> _Scaled:
    """The kernel centred on the pooled sample (which changes no MMD), and its null's second and third moment.

    The statistic is a quadratic form of random signs: with the centred kernel K off its diagonal, its variance is
    2 tr(K^2) (1/n + 1/m)^2 / N^2 and its skewness sqrt(8) tr(K^3) / tr(K^2)^1.5. Good enough for a common scale.
    """
    kernel = np.array(kernel, np.float64)
    if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1]:
        raise InputError(f"kernel {name} expected a square matrix over the pooled sample, found {kernel.shape}")
    size, num_second = len(kernel), len(kernel) - num_first
    if min(num_first, num_second) < 2:
        raise InputError(f"a two-sample test expects 2 items a side, found {num_first} and {num_second}; wait for more")
    if not np.isfinite(kernel).all():
        raise NonFiniteError(
            f"kernel {name} expected finite values, found NaN or infinity; check the features it is of"
        )
    off = ~np.eye(size, dtype=bool)
    np.fill_diagonal(kernel, 0)
    means = kernel.sum(axis=1) / (size - 2)
    kernel -= means[:, None] + means[None] - kernel.sum() / ((size - 1) * (size - 2))
    kernel *= off  # rows off the diagonal now sum to zero: U-centring (Szekely & Rizzo 2014)
    centred = kernel.astype(np.float32)
    squares = float(np.einsum("ij,ij->", kernel, kernel))
    if squares <= 1e-12 * size:
        return _Scaled(np.zeros_like(centred), 1.0, 1.0)
    cubes = float(np.einsum("ij,ij->", centred @ centred, centred, dtype=np.float64))
    skewness = max(0.02, math.sqrt(8) * cubes / squares**1.5)
    spread = math.sqrt(2 * squares) * (1 / num_first + 1 / num_second) / size
    return _Scaled(centred, spread, 4 / skewness**2)


def _test(scaled: dict[str, _Scaled], num_first: int, generator: np.random.Generator, permutations: int) -> TwoSample:
    """Draw the labels once, give them to every kernel, and count."""
    size = len(next(iter(scaled.values())).kernel)
    data = np.zeros((1, size), np.float32)
    data[0, :num_first] = 1
    blocks = [np.stack([mmd2_of_labels(one.kernel, data) for one in scaled.values()])]
    block = max(1, BLOCK // size)
    for start in range(0, permutations, block):
        labels = random_labels(generator, min(block, permutations - start), num_first, size)
        blocks.append(np.stack([mmd2_of_labels(one.kernel, labels) for one in scaled.values()]))
    mmd2_KB = np.concatenate(blocks, axis=1)
    deviations_KB = mmd2_KB / np.array([[one.spread] for one in scaled.values()])
    shape_K1 = np.array([[one.shape] for one in scaled.values()])
    surprise_KB, surprise_less_KB = (
        _surprise(deviations, shape_K1) for deviations in (deviations_KB, deviations_KB[:, :1] - SLACK)
    )
    reaching = int((surprise_KB[:, 1:].max(axis=0) >= surprise_less_KB.max()).sum())
    names = list(scaled)
    return TwoSample(
        (reaching + 1) / (permutations + 1),
        permutations,
        names[int(surprise_KB[:, 0].argmax())],
        dict(zip(names, mmd2_KB[:, 0].tolist(), strict=True)),
        dict(zip(names, deviations_KB[:, 0].tolist(), strict=True)),
    )


def _surprise(deviations_KB: NDArray[np.float64], shape_K1: NDArray[np.float64]) -> NDArray[np.float64]:
    """-log of the gamma tail, so that kernels with skewed and with symmetric nulls compete on equal terms.

    Any increasing function would keep the level; this one keeps the power of the less skewed.
    """
    tail = special.gammaincc(shape_K1, np.maximum(shape_K1 + deviations_KB * np.sqrt(shape_K1), 0))
    return np.asarray(-np.log(np.maximum(tail, np.finfo(np.float64).tiny)))
