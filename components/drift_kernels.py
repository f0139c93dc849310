"""How alike are two pictures, two captions, two pairs? Kernel matrices over a pooled sample, for two-sample tests.

All that is fitted here (widths, word weights, centres) is fitted on the pooled sample and never sees which side an item
is on, so permutation tests over these matrices keep their level. Alignment: the product of the *centred* picture and
caption kernels is a kernel of cross-covariance, so its MMD compares how pictures go with captions (Hilbert-Schmidt
norm of the difference of two cross-covariances; HSIC, Gretton et al. 2005, is the norm of one) and not what there is.
Shape letters: N pooled items, D feature width, K kernels.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from components.errors import InputError

Matrix = NDArray[np.float32]

WIDTHS = (0.25, 0.5, 1.0, 2.0)
"""Kernel widths in median distances: small clusters of new items show in narrow ones, moved means in wide ones."""


ROUNDING = 1e-12


def squared_distances(rows_ND: Any) -> NDArray[np.float64]:
    """Squared Euclidean distances (N, N), exactly zero on the diagonal."""
    rows = np.asarray(rows_ND, np.float64)
    if rows.ndim != 2:
        raise InputError(f"expected rows of features (N, D), found shape {rows.shape}")
    if not len(rows):
        return np.zeros((0, 0))
    rows = rows - rows.mean(axis=0)  # fewer digits are lost
    squares = (rows**2).sum(axis=1)
    distances = np.maximum(squares[:, None] + squares[None] - 2 * (rows @ rows.T), 0)
    distances[distances < ROUNDING * float(squares.max(initial=0))] = 0  # equal rows
    np.fill_diagonal(distances, 0)
    return np.asarray(distances)


def gaussian_kernels(rows_ND: Any, widths: Sequence[float] = WIDTHS) -> dict[float, Matrix]:
    """exp(-distance^2 / (2 (width * median distance)^2)) by width, from one matrix of distances."""
    distances = squared_distances(rows_ND)
    apart = distances[np.triu_indices(len(distances), 1)]
    apart = apart[apart > 0]
    median = float(np.median(apart)) if len(apart) else 1.0
    return {width: np.exp(distances / (-2 * width**2 * median)).astype(np.float32) for width in widths}


def words_of(caption: str) -> list[str]:
    """The words of a caption, lower case, without punctuation."""
    return re.findall(r"\w+", caption.lower())


def word_kernel(captions: Sequence[str]) -> Matrix:
    """Cosine of bags of words, a word weighted by log((N + 1) / (captions with it + 1)); 0 where nothing is shared."""
    bags = [sorted(set(words_of(caption))) for caption in captions]
    counts = Counter(word for bag in bags for word in bag)
    place = {word: index for index, word in enumerate(sorted(counts))}
    weight = {word: np.log((len(bags) + 1) / (count + 1)) + 1e-6 for word, count in counts.items()}
    columns = [place[word] for bag in bags for word in bag]
    values = np.array([weight[word] for bag in bags for word in bag], np.float64)
    starts = np.concatenate([[0], np.cumsum([len(bag) for bag in bags])])
    table = sparse.csr_matrix((values, columns, starts), shape=(len(bags), max(1, len(place))))
    norms = np.sqrt(np.asarray(table.multiply(table).sum(axis=1)).ravel())
    table = sparse.diags(1 / np.where(norms > 0, norms, 1)) @ table
    return np.asarray((table @ table.T).toarray(), np.float32)


def centred(kernel: Any) -> NDArray[np.float64]:
    """The kernel of the features minus their pooled mean."""
    kernel = np.asarray(kernel, np.float64)
    means = kernel.mean(axis=0)
    return np.asarray(kernel - means[:, None] - means[None] + means.mean())


def pair_kernel(picture_kernel: Any, caption_kernel: Any) -> Matrix:
    """The kernel of pairs whose MMD compares two cross-covariances of pictures and captions."""
    return (centred(picture_kernel) * centred(caption_kernel)).astype(np.float32)


def agreement(pair: Mapping[str, Any] | Any) -> NDArray[np.float64]:
    """For each pair the mean kernel value with all others, (N,): high where alike captions stand by alike pictures."""
    kernel = np.asarray(pair, np.float64)
    return np.asarray((kernel.sum(axis=1) - np.diagonal(kernel)) / (len(kernel) - 1))


def number_kernel(values_N: Any) -> Matrix:
    """The linear kernel of one number an item: its MMD is the squared difference of two means."""
    values = np.asarray(values_N, np.float64)
    values = values - values.mean()
    scale = float(values.std()) or 1.0
    return np.outer(values / scale, values / scale).astype(np.float32)
