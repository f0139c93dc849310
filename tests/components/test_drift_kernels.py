"""Kernels over a pooled sample: closed forms, and that pairs are compared by cross-covariance."""

import numpy as np
import pytest

from components.drift_kernels import (
    agreement,
    centred,
    gaussian_kernels,
    number_kernel,
    pair_kernel,
    squared_distances,
    word_kernel,
    words_of,
)
from components.errors import InputError


def test_gaussian_width_is_counted_in_median_distances():
    rows = np.array([[0.0], [1.0], [3.0]])  # distances 1, 2, 3: median 2
    kernel = gaussian_kernels(rows, (0.5,))[0.5]
    assert kernel[0, 1] == pytest.approx(np.exp(-0.5)) and kernel[0, 2] == pytest.approx(np.exp(-4.5))
    assert (np.diagonal(kernel) == 1).all()


def test_many_duplicates_do_not_make_the_width_zero():
    rows = np.concatenate([np.zeros((50, 2)), [[3.0, 4.0]]])
    kernel = gaussian_kernels(rows, (1.0,))[1.0]
    assert kernel[0, 50] == pytest.approx(np.exp(-0.5))
    assert np.isfinite(gaussian_kernels(np.ones((4, 2)), (1.0,))[1.0]).all()


def test_distances_keep_their_digits_far_from_the_origin():
    rows = np.array([[1e6, 0.0], [1e6 + 1e-3, 0.0]])
    assert squared_distances(rows)[0, 1] == pytest.approx(1e-6, rel=1e-4)


def test_word_kernel_is_the_cosine_of_weighted_words():
    captions = ["A red star.", "red circle", "blue circle", ""]
    kernel = word_kernel(captions)
    weight = {"a": np.log(5 / 2), "red": np.log(5 / 3), "star": np.log(5 / 2), "circle": np.log(5 / 3)}
    norms = [np.sqrt(sum(weight[word] ** 2 for word in words)) for words in (("a", "red", "star"), ("red", "circle"))]
    assert kernel[0, 1] == pytest.approx(weight["red"] ** 2 / (norms[0] * norms[1]), rel=1e-4)
    assert kernel[0, 2] == 0 and kernel[3].tolist() == [0, 0, 0, 0]
    assert np.diagonal(kernel)[:3] == pytest.approx([1, 1, 1])


def test_word_kernel_of_wordless_captions_is_zero():
    assert not word_kernel(["", "..."]).any()


def test_words_are_without_case_and_punctuation():
    assert words_of("A Red star, on-white!") == ["a", "red", "star", "on", "white"]


def test_pair_kernel_is_that_of_centred_features_multiplied():
    generator = np.random.default_rng(0)
    pictures, captions = generator.normal(size=(9, 3)) + 5, generator.normal(size=(9, 2)) - 2
    found = pair_kernel(pictures @ pictures.T, captions @ captions.T)
    products = np.einsum("nd,ne->nde", pictures - pictures.mean(axis=0), captions - captions.mean(axis=0)).reshape(9, 6)
    np.testing.assert_allclose(found, products @ products.T, rtol=1e-4, atol=1e-4)


def test_centred_kernel_has_rows_that_sum_to_zero():
    kernel = centred(gaussian_kernels(np.random.default_rng(0).normal(size=(7, 2)))[1.0])
    np.testing.assert_allclose(kernel.sum(axis=0), 0, atol=1e-9)


def test_agreement_is_high_where_alike_captions_stand_by_alike_pictures():
    kinds = np.repeat([0, 1], 20)
    pictures = captions = (kinds[:, None] == kinds[None]).astype(float)
    swapped = captions[np.ix_(np.r_[20, 1:20, 0, 21:40], np.r_[20, 1:20, 0, 21:40])]
    right, wrong = agreement(pair_kernel(pictures, captions)), agreement(pair_kernel(pictures, swapped))
    assert right.min() > 0.2 and wrong[[0, 20]].max() < 0 and wrong[1:20].min() > 0


def test_number_kernel_gives_the_squared_difference_of_standardised_means():
    values = np.array([1.0, 2.0, 6.0, 7.0])
    kernel = number_kernel(values)
    gap = kernel[:2, :2].mean() + kernel[2:, 2:].mean() - 2 * kernel[:2, 2:].mean()
    assert gap == pytest.approx((5 / values.std()) ** 2, rel=1e-5)
    assert not number_kernel(np.ones(5)).any()


def test_rows_of_the_wrong_shape_are_refused():
    with pytest.raises(InputError, match="rows of features"):
        squared_distances(np.ones(4))
