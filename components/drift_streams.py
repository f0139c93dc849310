"""What is compared between a reference and the arrivals: pictures, captions, how they go together, served prompts.

Each stream is a bank of kernel matrices over the pooled sample (reference first). Beside the encoder's rows stand plain
features (8x8 thumbnails, weighted words): an encoder that has never seen such pictures or words tells them badly apart,
and its cosines say nothing about whether they belong together. Rows of two encoders are never compared.
Shape letters: N items of one side, D feature width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from components.drift_kernels import Matrix, agreement, gaussian_kernels, number_kernel, pair_kernel, word_kernel
from components.errors import InputError

Array = NDArray[np.float64]

IMAGES, CAPTIONS, ALIGNMENT, PROMPTS = "images", "captions", "alignment", "prompts"
STREAMS = (IMAGES, CAPTIONS, ALIGNMENT, PROMPTS)
ENCODER, PIXELS, WORDS, COSINE, AGREEMENT = "encoder", "pixels", "words", "cosine", "agreement"
THUMBNAIL_PX = 8
PAIR_WIDTH = 0.5
"""Of the kernels behind pairs, in median distances; narrow, since captions tell of details."""
SUBSAMPLE_STREAM = 42
ROUNDS = 6
FEATURES = 50
"""Principal components of a kernel that a domain classifier is given."""


@dataclass(frozen=True)
class Texts:
    """Captions or prompts with the encoder's rows."""

    texts: tuple[str, ...]
    """Empty strings where only features were kept, as of served prompts: words are then not compared."""
    rows_ND: NDArray[np.float32]

    def __post_init__(self) -> None:
        _check_lengths("texts", {"texts": len(self.texts), "rows": len(self.rows_ND)})


@dataclass(frozen=True)
class Items:
    """One side: pictures with their captions, in one order, as one encoder sees them."""

    encoder: str
    """`ClipEncoder.identity`."""
    picture_rows_ND: NDArray[np.float32]
    thumbnails_ND: NDArray[np.float32]
    captions: Texts
    statistics: Mapping[str, Any] = field(default_factory=dict)
    """Values by name (`simple_statistics.KINDS`); each may be over other items than the pictures, such as rejects."""
    prompts: Texts | None = None
    """Prompts that were served; on the arrivals' side alone."""

    def __post_init__(self) -> None:
        lengths = {"pictures": len(self.picture_rows_ND), "thumbnails": len(self.thumbnails_ND)}
        _check_lengths("items", lengths | {"captions": len(self.captions.texts)})

    def __len__(self) -> int:
        return len(self.picture_rows_ND)


@dataclass(frozen=True)
class Bank:
    """The kernels of one stream over the pooled sample."""

    kernels: dict[str, Matrix]
    num_reference: int
    num_arrivals: int
    rows_ND: NDArray[np.float32]
    """Rows in which near duplicates are looked for."""
    pairs: dict[str, Matrix] = field(default_factory=dict)
    """Alignment alone: the kernels behind the agreements, by the agreement's name."""
    cosine_gain: float = 0.0
    """Alignment alone: by how many standard deviations the reference's own captions beat others in the cosine."""


def thumbnails(pictures: Sequence[Image.Image]) -> NDArray[np.float32]:
    """Pictures as 8x8 RGB in [0, 1], (N, 192)."""
    size = (THUMBNAIL_PX, THUMBNAIL_PX)
    small = [np.asarray(each.convert("RGB").resize(size, Image.Resampling.BOX), np.float32) for each in pictures]
    return np.stack([pixels.ravel() / 255 for pixels in small]) if small else np.zeros((0, 192), np.float32)


def check_encoders(reference: Items, arrivals: Items) -> None:
    """InputError where the two sides were encoded by different encoders."""
    if reference.encoder != arrivals.encoder:
        raise InputError(
            f"drift expected arrivals encoded by the reference's encoder {reference.encoder}, found"
            f" {arrivals.encoder}: distances between two encoders mean nothing; pin the reference again with the new"
            " encoder, or set model.clip back to the old one"
        )


def compared(reference: Items, arrivals: Items, seed: int, most_items: int) -> tuple[Items, Items]:
    """The items that a look compares: at most `most_items` a side, drawn by the seed, in their order."""
    return _drawn(reference, (seed, 0), most_items), _drawn(arrivals, (seed, 1), most_items)


def _drawn(items: Items, seed: tuple[int, int], most: int) -> Items:
    """At most `most` of the items and of the prompts, drawn without replacement, in their order."""
    generator = np.random.default_rng((*seed, SUBSAMPLE_STREAM))

    def places(size: int) -> np.ndarray:
        return np.arange(size) if size <= most else np.sort(generator.choice(size, most, replace=False))

    def texts(given: Texts, rows: np.ndarray) -> Texts:
        return Texts(tuple(given.texts[row] for row in rows), given.rows_ND[rows])

    rows = places(len(items))
    prompts = items.prompts and texts(items.prompts, places(len(items.prompts.texts)))
    return Items(
        items.encoder,
        items.picture_rows_ND[rows],
        items.thumbnails_ND[rows],
        texts(items.captions, rows),
        items.statistics,
        prompts,
    )


def make_bank(stream: str, reference: Items, arrivals: Items) -> Bank:
    """The bank of a stream; InputError for an unknown name, or for prompts where none were served."""
    if stream == IMAGES:
        return _picture_bank(reference, arrivals)
    if stream == CAPTIONS:
        return _text_bank(reference.captions, arrivals.captions)
    if stream == ALIGNMENT:
        return _alignment_bank(reference, arrivals)
    if stream == PROMPTS and arrivals.prompts is not None:
        return _text_bank(reference.captions, arrivals.prompts)
    found = "no served prompts" if stream == PROMPTS else repr(stream)
    raise InputError(f"expected a stream of {', '.join(STREAMS)} with items on both sides, found {found}")


def _picture_bank(reference: Items, arrivals: Items) -> Bank:
    rows = _pooled(reference.picture_rows_ND, arrivals.picture_rows_ND)
    pixels = _pooled(reference.thumbnails_ND, arrivals.thumbnails_ND)
    kernels = _named(ENCODER, gaussian_kernels(rows)) | _named(PIXELS, gaussian_kernels(pixels, (0.5, 1.0)))
    return Bank(kernels, len(reference), len(arrivals), rows)


def _text_bank(reference: Texts, arrivals: Texts) -> Bank:
    rows = _pooled(reference.rows_ND, arrivals.rows_ND)
    kernels = _named(ENCODER, gaussian_kernels(rows))
    if any(reference.texts) and any(arrivals.texts):
        kernels[WORDS] = word_kernel([*reference.texts, *arrivals.texts])
    return Bank(kernels, len(reference.texts), len(arrivals.texts), rows)


def _alignment_bank(reference: Items, arrivals: Items) -> Bank:
    """The encoder's cosine of each pair; cross-covariances; and how well each pair agrees with all others.

    The agreement is a number for each pair, so its test is one of two means: of the three the strongest by far where
    captions are shuffled. Cross-covariances also see captions that are wrong by a rule, which agree among themselves.
    """
    pictures = _pooled(reference.picture_rows_ND, arrivals.picture_rows_ND)
    pixels = _pooled(reference.thumbnails_ND, arrivals.thumbnails_ND)
    texts = _pooled(reference.captions.rows_ND, arrivals.captions.rows_ND)
    seen = {ENCODER: pictures, PIXELS: pixels}
    picture_kernels = {name: gaussian_kernels(rows, (PAIR_WIDTH,))[PAIR_WIDTH] for name, rows in seen.items()}
    caption_kernels = {
        ENCODER: gaussian_kernels(texts, (PAIR_WIDTH,))[PAIR_WIDTH],
        WORDS: word_kernel([*reference.captions.texts, *arrivals.captions.texts]),
    }
    kernels: dict[str, Matrix] = {}
    gain = 0.0
    if pictures.shape == texts.shape:
        cosines = (pictures * texts).sum(axis=1)
        kernels[COSINE] = number_kernel(cosines)
        own = cosines[: len(reference)]
        others = float((reference.picture_rows_ND.mean(axis=0) * reference.captions.rows_ND.mean(axis=0)).sum())
        gain = (float(own.mean()) - others) / (float(own.std()) or 1.0)
    pairs: dict[str, Matrix] = {}
    for picture, caption in product(picture_kernels, caption_kernels):
        name = f"{picture} x {caption}"
        pair = pair_kernel(picture_kernels[picture], caption_kernels[caption])
        kernels[name], kernels[f"{name} {AGREEMENT}"] = pair, number_kernel(agreement(pair))
        pairs[f"{name} {AGREEMENT}"] = pair
    return Bank(kernels, len(reference), len(arrivals), pictures, pairs, gain)


def kernel_features(kernel: Any, most: int = FEATURES) -> Array:
    """The pooled sample's first kernel principal components, (N, at most `most`): Schoelkopf et al. 1998."""
    matrix = np.asarray(kernel, np.float64)
    means = matrix.mean(axis=0)
    matrix = matrix - means[:, None] - means[None] + means.mean()
    size = len(matrix)
    # Subspace iteration (Halko et al. 2011): no slower than it must be, and sound for any rank, also 0
    basis = np.random.default_rng(0).normal(size=(size, min(size, most + 10)))
    for _ in range(ROUNDS):
        basis = np.linalg.qr(matrix @ basis)[0]
    values, vectors = np.linalg.eigh(basis.T @ matrix @ basis)
    values, vectors = values[-most:], basis @ vectors[:, -most:]
    kept = values > 1e-6 * max(float(values[-1]), 1e-12)
    return np.asarray(vectors[:, kept] * np.sqrt(values[kept]))


def _named(space: str, kernels: Mapping[float, Matrix]) -> dict[str, Matrix]:
    return {f"{space}, width {width:g}": kernel for width, kernel in kernels.items()}


def _pooled(reference: NDArray[np.float32], arrivals: NDArray[np.float32]) -> NDArray[np.float32]:
    if reference.shape[1:] != arrivals.shape[1:]:
        raise InputError(f"expected features of one width on both sides, found {reference.shape} and {arrivals.shape}")
    return np.concatenate([np.asarray(reference, np.float32), np.asarray(arrivals, np.float32)])


def _check_lengths(what: str, lengths: Mapping[str, int]) -> None:
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{count} {name}" for name, count in lengths.items())
        raise InputError(f"expected as many of each for the same {what}, found {told}")
