"""The copy check: finds what was copied, and nothing where nothing was."""

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from components.copies import Nearest, copying, near_copies, nearest_rows, pixel_distances
from components.errors import InputError


def unit(seed: int, n: int, width: int = 6) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, width))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def at(distances: np.ndarray, pixels: np.ndarray | None = None) -> Nearest:
    distances = np.asarray(distances, float)
    return Nearest(np.zeros(len(distances), int), distances, distances if pixels is None else pixels)


def test_nearest_rows_agree_with_loops_whatever_the_block(monkeypatch):
    features, training = unit(0, 15), unit(1, 40)
    loops = np.array([[np.linalg.norm(x - y) for y in training] for x in features])
    for block in (512, 4):
        monkeypatch.setattr("components.copies.BLOCK_ROWS", block)
        index, distance = nearest_rows(features, training)
        assert (index == loops.argmin(axis=1)).all() and distance == pytest.approx(loops.min(axis=1))


def test_a_training_picture_is_at_no_distance_from_itself():
    training = unit(0, 30).astype(np.float32)
    index, distance = nearest_rows(training[[3, 17]], training)
    assert index.tolist() == [3, 17] and (distance == 0).all()
    with pytest.raises(InputError, match="found none"):
        nearest_rows(training, training[:0])


def test_pixel_distance_is_the_root_mean_square_in_unit_range():
    white, black = (Image.new("RGB", (8, 8), shade) for shade in ("white", "black"))
    half = white.copy()
    half.paste(black.resize((8, 4)), (0, 0))
    assert pixel_distances([white, white, white], [white, black, half]) == pytest.approx([0, 1, np.sqrt(0.5)])
    assert pixel_distances([white], [black.resize((16, 16))]) == pytest.approx([1])


def test_copying_is_mann_whitneys_statistic_with_its_left_out_values():
    drawn, unseen = np.array([0.1, 0.4, 0.4, 0.9]), np.array([0.2, 0.4, 0.8, 1.0, 0.3])

    def by_loops(mine: np.ndarray, theirs: np.ndarray) -> float:
        return float(np.mean([(x < y) + (x == y) / 2 for x in mine for y in theirs]))

    found = copying(at(drawn), at(unseen))
    assert found.value == pytest.approx(by_loops(drawn, unseen))
    assert found.value == pytest.approx(stats.mannwhitneyu(unseen, drawn).statistic / 20)
    assert found.without[0] == pytest.approx([by_loops(np.delete(drawn, i), unseen) for i in range(4)])
    assert found.without[1] == pytest.approx([by_loops(drawn, np.delete(unseen, i)) for i in range(5)])


def test_a_model_that_gives_training_pictures_back_is_told_from_one_that_does_not():
    training, unseen = unit(0, 200), unit(1, 80)
    reference = at(nearest_rows(unseen, training)[1])
    honest, copier = unit(2, 64), training[:64] + 0.01 * unit(3, 64)
    fair = copying(at(nearest_rows(honest, training)[1]), reference).share()
    caught = copying(at(nearest_rows(copier, training)[1]), reference).share()
    assert fair.low < 0.5 < fair.high
    assert caught.value == 1 and 0.9 < caught.low < 1


def test_copying_interval_covers_one_half_where_nothing_is_copied():
    hits = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        found = copying(at(rng.gamma(2, 1, 40)), at(rng.gamma(2, 1, 60))).share()
        hits += found.low <= 0.5 <= found.high
    assert hits / 300 >= 0.93  # 95 % stated, standard error 1.3 %


def test_near_copies_must_be_near_in_features_and_in_pixels():
    unseen = at(np.linspace(1, 2, 50))
    distances = np.array([0.1, 0.1, 1.5, 1.5])
    pixels = np.array([0.1, 1.5, 0.1, 1.5])
    found = near_copies(at(distances, pixels), unseen)
    assert (found.value, found.n) == (0.25, 4)


def test_near_copies_are_rare_where_nothing_is_copied():
    shares = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        shares.append(near_copies(at(rng.gamma(2, 1, 64)), at(rng.gamma(2, 1, 100))).value)
    assert np.mean(shares) < 0.02
