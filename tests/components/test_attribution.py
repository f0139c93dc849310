"""Explanations: the planted items and words come first, twins are one cluster, nothing comes of nothing."""

import math

import numpy as np
import pytest

from components.attribution import clusters, disagreement, drifted_words, k_medoids, witness
from components.drift_kernels import gaussian_kernels, pair_kernel, squared_distances
from components.errors import InputError


def planted() -> np.ndarray:
    """60 of the reference, 60 arrivals of which the last 12 and the 8 before are two new things."""
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(120, 6))
    rows[108:] = [9, 0, 0, 0, 0, 0] + 0.3 * generator.normal(size=(12, 6))
    rows[100:108] = [0, 9, 0, 0, 0, 0] + 0.3 * generator.normal(size=(8, 6))
    return rows


def test_witness_is_the_mean_with_other_arrivals_minus_that_with_the_reference():
    kernel = np.arange(25.0).reshape(5, 5)
    kernel = kernel + kernel.T
    assert witness(kernel, 2)[0] == pytest.approx((kernel[2, 3] + kernel[2, 4]) / 2 - (kernel[2, 0] + kernel[2, 1]) / 2)
    with pytest.raises(InputError, match="2 arrivals, found 4 and 1"):
        witness(kernel, 4)


def test_new_things_come_first_each_as_one_cluster():
    kernel = gaussian_kernels(planted())[1.0]
    found = clusters(kernel, witness(kernel, 60), 60, top=20)
    assert [set(one.members) for one in found[:2]] == [set(range(48, 60)), set(range(40, 48))]
    assert all(one.medoid in one.members for one in found) and found[0].value > 0


def test_clusters_of_one_thing_are_one():
    generator = np.random.default_rng(0)
    rows = np.r_[generator.normal(size=(50, 4)), 8 + generator.normal(size=(50, 4))]
    kernel = gaussian_kernels(rows)[1.0]
    assert len(clusters(kernel, witness(kernel, 50), 50)) == 1


def test_arrivals_that_did_not_drift_are_not_shown():
    kernel = gaussian_kernels(np.random.default_rng(0).normal(size=(20, 2)))[1.0]
    assert clusters(kernel, -np.ones(10), 10) == ()


def test_medoids_are_the_centres_of_tight_groups():
    rows = np.array([[0.0], [1.0], [2.0], [50.0], [51.0], [52.0]])
    labels, medoids = k_medoids(np.sqrt(squared_distances(rows)), 2)
    assert sorted(medoids) == [1, 4] and len({*labels[:3]}) == len({*labels[3:]}) == 1


def test_wrong_captions_disagree_with_the_reference():
    kinds = np.tile([0, 1], 30)
    wrong = kinds.copy()
    wrong[[50, 55]] = 1 - wrong[[50, 55]]
    same = [(each[:, None] == each[None]).astype(float) for each in (kinds, wrong)]
    values = disagreement(pair_kernel(*same), 40)
    assert set(np.argsort(-values)[:2]) == {10, 15} and values[[10, 15]].min() > 0 > np.delete(values, [10, 15]).max()


def test_words_that_came_and_went_are_named_with_their_counts():
    reference = ["a red star"] * 40 + ["a blue ring"] * 40
    arrivals = ["a red star"] * 40 + ["a green ring"] * 30 + ["an odd ring"] * 10
    found = {word.text: word for word in drifted_words(reference, arrivals)}
    assert list(found)[:2] == ["blue", "green"]
    assert (found["blue"].reference, found["blue"].arrivals) == (40, 0) and found["blue"].deviations < -3
    assert (found["green"].reference, found["green"].arrivals) == (0, 30) and found["green"].deviations > 3
    assert abs(found["ring"].deviations) < 0.5


def test_word_score_is_the_log_odds_ratio_with_a_pooled_prior():
    word = drifted_words(["x"] * 10 + ["y"] * 10, ["x"] * 5 + ["y"] * 15)[0]
    prior = 10 * 15 / 40  # of x; y has the rest of 10
    odds = [(10 + prior) / (10 + 10 - prior), (5 + prior) / (15 + 10 - prior)]
    error = math.sqrt(1 / (10 + prior) + 1 / (20 - prior) + 1 / (5 + prior) + 1 / (25 - prior))
    assert abs(word.deviations) == pytest.approx(abs(math.log(odds[1] / odds[0])) / error)


def test_word_counts_once_a_caption_and_rare_words_are_left_out():
    found = drifted_words(["dog dog dog"] * 3 + ["cat"] * 9, ["cat"] * 9 + ["dog dog"])
    assert [word.text for word in found] == ["cat"]


def test_words_of_equal_sides_are_noise():
    generator = np.random.default_rng(0)
    sides = [[" ".join(generator.choice(list("abcdefgh"), 3)) for _ in range(200)] for _ in range(2)]
    assert max(abs(word.deviations) for word in drifted_words(*sides)) < 3.5
    with pytest.raises(InputError, match="found 0 and 2"):
        drifted_words([], ["a", "b"])
