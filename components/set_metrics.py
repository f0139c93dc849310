"""What can be said of a set of drawn pictures as a whole: coverage, density, FID and Inception Score.

Coverage and density (Naeem et al. 2020) follow their reference code (`prdc`): a ball around each real picture reaches
to its k-th nearest real one, and what lies strictly inside is close. FID (Heusel et al. 2017) and Inception Score
(Salimans et al. 2016) are biased by their sample size, and FID's bias depends on the model (Chong & Forsyth 2020): they
are reported with a warning below that size, and never compared. Intervals are jackknives over pictures.
Shape letters: N real, M drawn pictures, D feature width, K classes, G groups.
"""

from typing import Any

import numpy as np
from scipy import special

from components.errors import InputError
from components.metrics import Array, LeftOut

NEIGHBOURS = 5
FID_PICTURES, IS_PICTURES = 10_000, 5_000
FID_WARNING = (
    f"biased below {FID_PICTURES:,} pictures, by an amount that depends on the model: not for comparing models,"
    " and the interval leaves the bias out"
)
IS_WARNING = f"biased below {IS_PICTURES:,} pictures: not for comparing models, and the interval leaves the bias out"
GROUPS = 20
BLOCK_ROWS = 512


def coverage_and_density(
    real_ND: Any, drawn_MD: Any, paired: bool = False, neighbours: int = NEIGHBOURS
) -> tuple[LeftOut, LeftOut]:
    """Share of real pictures with a drawn one inside their ball, and how many balls a drawn one lies in, over k.

    A real set against itself scores about 1 in both; coverage sees modes that are missing, density does not. `paired`
    says that row i of both belongs to one caption: such a pair is close for that reason alone, so it does not count.
    (The other captions are shared all the same, so the ceiling is nearer to 1 than between strangers.)
    """
    real, drawn = _matching(real_ND, drawn_MD, paired)
    n, m = len(real), len(drawn)
    if n < neighbours + 2 or m < 2:
        raise InputError(
            f"coverage with an interval expects {neighbours + 2} real and 2 drawn pictures or more, found {n} and {m}"
        )
    covered, close = 0.0, 0.0
    covered_less_real, close_less_real = np.zeros(n), np.zeros(n)  # summed over the real pictures that are left
    covered_less_drawn, close_less_drawn = np.zeros(m), np.zeros(m)
    for start in range(0, n, BLOCK_ROWS):
        rows = np.arange(start, min(start + BLOCK_ROWS, n))
        inside, inside_wider, near = _balls(real, drawn, rows, neighbours, paired)
        own = np.arange(n) != rows[:, None]  # a real picture that is left out has no ball
        count, wider = inside.sum(axis=1), inside_wider.sum(axis=1)
        covered, close = covered + float((count > 0).sum()), close + float(count.sum())
        if paired:  # picture and drawing of a caption go together
            left = np.where(near, wider[:, None] - inside_wider, count[:, None] - inside) * own
        else:
            left = np.where(near, wider[:, None], count[:, None]) * own
            covered_less_drawn += (count[:, None] - inside > 0).sum(axis=0)
            close_less_drawn += (count[:, None] - inside).sum(axis=0)
        covered_less_real += (left > 0).sum(axis=0)
        close_less_real += left.sum(axis=0)
    k = neighbours
    size = min(n, m)
    if paired:
        coverage = LeftOut(covered / n, (covered_less_real / (n - 1),), size)
        return coverage, LeftOut(close / (k * (m - 1)), (close_less_real / (k * (m - 2)),), size)
    coverage = LeftOut(covered / n, (covered_less_real / (n - 1), covered_less_drawn / n), size)
    return coverage, LeftOut(close / (k * m), (close_less_real / (k * m), close_less_drawn / (k * (m - 1))), size)


def _balls(real: Array, drawn: Array, rows: Any, k: int, paired: bool) -> tuple[Any, Any, Any]:
    """For the real pictures `rows`: which drawn are inside the ball, inside the ball to the (k + 1)-th neighbour, and
    which real ones are among the k nearest (without one of them the ball is the wider one)."""
    among_real = _squared_distances(real[rows], real)
    among_real[np.arange(len(rows)), rows] = np.inf
    nearest = np.argsort(among_real, axis=1, kind="stable")[:, : k + 1]
    reach = np.take_along_axis(among_real, nearest, axis=1)
    near = np.zeros(among_real.shape, bool)
    np.put_along_axis(near, nearest[:, :k], True, axis=1)
    to_drawn = _squared_distances(real[rows], drawn)
    if paired:
        to_drawn[np.arange(len(rows)), rows] = np.inf
    return to_drawn < reach[:, k - 1 : k], to_drawn < reach[:, k : k + 1], near


def _squared_distances(x_ND: Array, y_MD: Array) -> Array:
    squares = (x_ND**2).sum(axis=1)[:, None] + (y_MD**2).sum(axis=1) - 2 * (x_ND @ y_MD.T)
    return np.asarray(np.maximum(squares, 0))


def fid(real_ND: Any, drawn_MD: Any, paired: bool = False) -> LeftOut:
    """Squared Wasserstein distance of two Gaussians with the sets' means and covariances.

    Left out are G groups of pictures in turn, picture i being in group i mod G: single ones would cost O(N D^3). The
    interval is of the sampling noise; the bias of a small sample is not in it (`FID_WARNING`).
    """
    real, drawn = _matching(real_ND, drawn_MD, paired)
    n, m = len(real), len(drawn)
    if min(n, m) < 4:
        raise InputError(f"FID with an interval expects at least 4 pictures on each side, found {n} and {m}")
    groups = min(GROUPS, n // 2, m // 2)
    kept_real = [real[np.arange(n) % groups != group] for group in range(groups)]
    kept_drawn = [drawn[np.arange(m) % groups != group] for group in range(groups)]
    value = _frechet(real, drawn)
    if paired:
        pairs = zip(kept_real, kept_drawn, strict=True)
        return LeftOut(value, (np.array([_frechet(one, other) for one, other in pairs]),), n)
    less_real = np.array([_frechet(rows, drawn) for rows in kept_real])
    less_drawn = np.array([_frechet(real, rows) for rows in kept_drawn])
    return LeftOut(value, (less_real, less_drawn), min(n, m))


def _frechet(real_ND: Array, drawn_MD: Array) -> float:
    """|difference of means|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)), float64.

    The last trace is taken over eigenvalues of A^(1/2) B A^(1/2), which is symmetric: scipy's sqrtm of A B turns
    complex where pictures are fewer than features.
    """
    shift = real_ND.mean(axis=0) - drawn_MD.mean(axis=0)
    first, second = np.cov(real_ND, rowvar=False), np.cov(drawn_MD, rowvar=False)
    values, vectors = np.linalg.eigh(np.atleast_2d(first))
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.linalg.eigvalsh(root @ np.atleast_2d(second) @ root)
    total = shift @ shift + np.trace(np.atleast_2d(first)) + np.trace(np.atleast_2d(second))
    return float(total - 2 * np.sqrt(np.maximum(shared, 0)).sum())


def inception_score(probabilities_NK: Any) -> LeftOut:
    """exp of the mean divergence of a picture's class probabilities from their mean over pictures, in [1, K].

    Over all pictures at once: the usual ten splits add bias without adding knowledge (Barratt & Sharma 2018).
    """
    given = np.asarray(probabilities_NK, np.float64)
    if given.ndim != 2 or len(given) < 3 or not np.allclose(given.sum(axis=1), 1, atol=1e-4) or (given < 0).any():
        raise InputError(
            f"Inception Score expects class probabilities of at least 3 pictures, found an array {given.shape} whose"
            " rows are none; take the softmax over classes"
        )
    n = len(given)
    certainty_N = special.xlogy(given, given).sum(axis=1)
    total_K = given.sum(axis=0)

    def score(certainty: Any, mean: Array) -> Any:
        return np.exp(certainty - special.xlogy(mean, mean).sum(axis=-1))

    without = score((certainty_N.sum() - certainty_N) / (n - 1), np.maximum(total_K - given, 0) / (n - 1))
    return LeftOut(float(score(certainty_N.mean(), total_K / n)), (without,), n)


def class_probabilities(features_ND: Any, class_features_KD: Any, logit_scale: float) -> Array:
    """What a CLIP says of each picture when asked to choose among texts: softmax of the scaled cosines, (N, K)."""
    logits_NK = logit_scale * (np.asarray(features_ND, np.float64) @ np.asarray(class_features_KD, np.float64).T)
    return np.asarray(special.softmax(logits_NK, axis=1))


def _matching(real_ND: Any, drawn_MD: Any, paired: bool) -> tuple[Array, Array]:
    real, drawn = np.asarray(real_ND, np.float64), np.asarray(drawn_MD, np.float64)
    if real.ndim != 2 or drawn.ndim != 2 or real.shape[1] != drawn.shape[1]:
        raise InputError(f"expected two sets of features of one width, found {real.shape} and {drawn.shape}")
    if paired and len(real) != len(drawn):
        raise InputError(f"expected a drawn picture for each real one, found {len(real)} and {len(drawn)}")
    return real, drawn
