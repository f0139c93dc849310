"""Which arrivals drifted, and which words? Explanations of an alarm, to be looked at; nothing here is a test.

Items are ranked by the witness function of the MMD (Gretton et al. 2012, section 2.3): how much more an item is like
the arrivals than like the reference, itself left out. The highest are clustered around medoids, so that ten
pictures of one new thing are one entry. Words are ranked by log odds with the pooled counts as prior, in standard
errors (Monroe et al. 2008, doi:10.1093/pan/mpn018, eq. 22); a word counts once a caption, and rare words are left out.
Shape letters: N pooled items (reference first), M arrivals, T items to cluster.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from components.drift_kernels import words_of
from components.errors import InputError

Array = NDArray[np.float64]

TOP_ITEMS, MOST_CLUSTERS, ROUNDS = 40, 5, 20
FEWEST_CAPTIONS = 5
"""Words in fewer captions, both sides together, say nothing."""
PRIOR = 10.0
"""Captions' worth of pooled word counts that both sides are given beforehand."""


@dataclass(frozen=True)
class Cluster:
    """Drifted arrivals that are alike."""

    medoid: int
    """Place among the arrivals of the one that is most like the others."""
    members: tuple[int, ...]
    """Places among the arrivals, the most drifted first."""
    value: float
    """Mean of the members' values: how much they drifted."""


@dataclass(frozen=True)
class Word:
    text: str
    deviations: float
    """Above 0: more frequent in the arrivals; in standard errors, |z| below 2 is noise for any one word."""
    reference: int
    """Captions with it."""
    arrivals: int


def witness(kernel: Any, num_reference: int) -> Array:
    """For every arrival its mean kernel value with the other arrivals minus that with the reference, (M,)."""
    kernel = np.asarray(kernel, np.float64)
    num_arrivals = len(kernel) - num_reference
    if num_reference < 1 or num_arrivals < 2:
        raise InputError(
            f"a witness function expects a reference and 2 arrivals, found {num_reference} and {num_arrivals}"
        )
    rows = kernel[num_reference:]
    own = np.diagonal(kernel)[num_reference:]
    with_arrivals = (rows[:, num_reference:].sum(axis=1) - own) / (num_arrivals - 1)
    return np.asarray(with_arrivals - rows[:, :num_reference].mean(axis=1))


def disagreement(pair_kernel: Any, num_reference: int) -> Array:
    """For every arrival how badly its picture goes with its caption, judged by the reference's pairs, (M,)."""
    return np.asarray(-np.asarray(pair_kernel, np.float64)[num_reference:, :num_reference].mean(axis=1))


def clusters(kernel: Any, values_M: Any, num_reference: int, top: int = TOP_ITEMS) -> tuple[Cluster, ...]:
    """The arrivals with the highest values above 0, clustered by kernel distance; the largest cluster first.

    Deterministic. Every number of clusters up to 5 is tried and the one with the best mean silhouette taken.
    """
    values = np.asarray(values_M, np.float64)
    places = np.argsort(-values, kind="stable")[:top]
    places = places[values[places] > 0]
    if not len(places):
        return ()
    block = np.asarray(kernel, np.float64)[np.ix_(places + num_reference, places + num_reference)]
    own = np.diagonal(block)
    distances = np.sqrt(np.maximum(own[:, None] + own[None] - 2 * block, 0))
    labels, medoids = _best_clustering(distances)
    found = []
    for number, medoid in enumerate(medoids):
        members = places[labels == number]
        found.append(
            Cluster(int(places[medoid]), tuple(int(place) for place in members), float(values[members].mean()))
        )
    return tuple(sorted(found, key=lambda cluster: (-len(cluster.members), -cluster.value)))


def _best_clustering(distances_TT: Array) -> tuple[NDArray[np.int64], list[int]]:
    size = len(distances_TT)
    best, chosen = 0.25, (np.zeros(size, np.int64), [int(distances_TT.sum(axis=1).argmin())])  # below: no structure
    for number in range(2, min(MOST_CLUSTERS, size // 2) + 1):
        labels, medoids = k_medoids(distances_TT, number)
        quality = _silhouette(distances_TT, labels)
        if quality > best:
            best, chosen = quality, (labels, medoids)
    return chosen


def k_medoids(distances_TT: Array, number: int) -> tuple[NDArray[np.int64], list[int]]:
    """Labels (T,) and medoids: begin with the most central item, add the farthest, then alternate until at rest."""
    medoids = [int(distances_TT.sum(axis=1).argmin())]
    while len(medoids) < number:
        medoids.append(int(distances_TT[:, medoids].min(axis=1).argmax()))
    labels = np.asarray(distances_TT[:, medoids].argmin(axis=1), np.int64)
    for _ in range(ROUNDS):
        moved = []
        for label, medoid in enumerate(medoids):
            members = np.flatnonzero(labels == label)
            inner = distances_TT[np.ix_(members, members)].sum(axis=1)
            moved.append(int(members[inner.argmin()]) if len(members) else medoid)
        if moved == medoids:
            break
        medoids = moved
        labels = np.asarray(distances_TT[:, medoids].argmin(axis=1), np.int64)
    return labels, medoids


def _silhouette(distances_TT: Array, labels_T: NDArray[np.int64]) -> float:
    """Mean of (b - a) / max(a, b): a to the own cluster, b to the next one (Rousseeuw 1987); 0 for lone items."""
    kinds = np.unique(labels_T)
    if len(kinds) < 2:
        return 0.0
    sums = np.stack([distances_TT[:, labels_T == kind].sum(axis=1) for kind in kinds], axis=1)
    counts = np.array([(labels_T == kind).sum() for kind in kinds])
    own = np.searchsorted(kinds, labels_T)
    rows = np.arange(len(labels_T))
    near = sums[rows, own] / np.maximum(counts[own] - 1, 1)
    others = sums / counts
    others[rows, own] = np.inf
    far = others.min(axis=1)
    widest = np.maximum(near, far)
    values = np.where((counts[own] > 1) & (widest > 0), (far - near) / np.where(widest > 0, widest, 1), 0)
    return float(values.mean())


def drifted_words(reference: Sequence[str], arrivals: Sequence[str], most: int = 20) -> tuple[Word, ...]:
    """The words whose frequency in captions changed most, either way, the surest first."""
    counts = [Counter(word for caption in side for word in set(words_of(caption))) for side in (reference, arrivals)]
    sizes = [len(reference), len(arrivals)]
    if min(sizes) < 1:
        raise InputError(f"words are compared between two sets of captions, found {sizes[0]} and {sizes[1]}")
    found = []
    for text in sorted(set(counts[0]) | set(counts[1])):
        seen = (counts[0][text], counts[1][text])
        if sum(seen) >= FEWEST_CAPTIONS:
            found.append(Word(text, _log_odds_deviations(seen, sizes), *seen))
    return tuple(sorted(found, key=lambda word: (-abs(word.deviations), word.text))[:most])


def _log_odds_deviations(seen: tuple[int, int], sizes: list[int]) -> float:
    """Log odds ratio over its standard error, both sides given `PRIOR` captions with the pooled share of the word."""
    prior = PRIOR * sum(seen) / sum(sizes)
    with_word = [count + prior for count in seen]
    without = [size - count + PRIOR - prior for count, size in zip(seen, sizes, strict=True)]
    odds = [math.log(one) - math.log(max(other, 0.5)) for one, other in zip(with_word, without, strict=True)]
    error = math.sqrt(sum(1 / one + 1 / max(other, 0.5) for one, other in zip(with_word, without, strict=True)))
    return (odds[1] - odds[0]) / error
