"""Coverage, density, FID and Inception Score against direct loops, closed forms and torchmetrics."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, special, stats

from components.errors import InputError
from components.set_metrics import class_probabilities, coverage_and_density, fid, inception_score


def rows(seed: int, n: int, width: int = 4, mean: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1, (n, width))


def naeem_by_loops(real: np.ndarray, drawn: np.ndarray, k: int, paired: bool) -> tuple[float, float]:
    """Naeem et al. 2020, eq. 5 and 6, picture by picture; equal pairs do not count where `paired`."""
    covered, inside = 0, 0
    for i, x in enumerate(real):
        radius = sorted(np.linalg.norm(x - other) for j, other in enumerate(real) if j != i)[k - 1]
        close = [np.linalg.norm(x - y) < radius for j, y in enumerate(drawn) if not (paired and i == j)]
        covered += any(close)
        inside += sum(close)
    return covered / len(real), inside / (k * (len(drawn) - paired))


@pytest.mark.parametrize(("n", "m", "paired"), [(15, 15, True), (15, 11, False), (9, 20, False)])
def test_coverage_and_density_agree_with_loops_also_without_each_picture(n, m, paired):
    real, drawn = rows(0, n), rows(1, m, mean=0.5)
    coverage, density = coverage_and_density(real, drawn, paired, neighbours=3)
    assert (coverage.value, density.value) == pytest.approx(naeem_by_loops(real, drawn, 3, paired))
    if paired:
        without = [naeem_by_loops(np.delete(real, i, 0), np.delete(drawn, i, 0), 3, True) for i in range(n)]
        expected = [np.array(without)]
    else:
        less_real = [naeem_by_loops(np.delete(real, i, 0), drawn, 3, False) for i in range(n)]
        less_drawn = [naeem_by_loops(real, np.delete(drawn, j, 0), 3, False) for j in range(m)]
        expected = [np.array(less_real), np.array(less_drawn)]
    for found, column in ((coverage, 0), (density, 1)):
        for ours, theirs in zip(found.without, expected, strict=True):
            assert ours == pytest.approx(theirs[:, column])


def test_coverage_blocks_do_not_change_the_value(monkeypatch):
    real, drawn = rows(0, 40), rows(1, 40)
    whole = coverage_and_density(real, drawn, paired=True)
    monkeypatch.setattr("components.set_metrics.BLOCK_ROWS", 7)
    for one, other in zip(whole, coverage_and_density(real, drawn, paired=True), strict=True):
        assert one.value == other.value and one.without[0] == pytest.approx(other.without[0])


def test_coverage_of_equal_distributions_is_what_naeem_derives():
    """E[coverage] = 1 - (N-1)...(N-k) / ((M+N-1)...(M+N-k)), E[density] = 1 (section 3.2)."""
    n = m = 30
    k = 5
    expected = 1 - np.prod([(n - i) / (m + n - i) for i in range(1, k + 1)])
    found = [coverage_and_density(rows(2 * seed, n), rows(2 * seed + 1, m)) for seed in range(150)]
    coverage, density = (np.array([pair[i].value for pair in found]) for i in range(2))
    assert coverage.mean() == pytest.approx(expected, abs=3 * coverage.std() / np.sqrt(150))
    assert density.mean() == pytest.approx(1, abs=3 * density.std() / np.sqrt(150))


def test_a_drawing_does_not_cover_the_real_picture_of_its_own_caption():
    """Real pictures in twos, 1 apart; drawings 0.01 outside: only the own drawing lies within 1."""
    real = np.array([[100.0 * place + side] for place in range(6) for side in (0, 1)])
    drawn = real + np.array([[-0.01], [0.01]] * 6)
    assert coverage_and_density(real, drawn, neighbours=1)[0].value == 1
    assert coverage_and_density(real, drawn, paired=True, neighbours=1)[0].value == 0


def test_coverage_falls_when_a_mode_is_missing_and_density_does_not():
    real = np.concatenate([rows(0, 40), rows(1, 40, mean=20)])
    whole = np.concatenate([rows(2, 40), rows(3, 40, mean=20)])
    half = rows(4, 80)
    (full_coverage, _), (half_coverage, half_density) = (coverage_and_density(real, drawn) for drawn in (whole, half))
    assert full_coverage.value > 0.9 and full_coverage.share().low > 0.7 > half_coverage.share().high
    assert half_density.value > 0.7


def test_coverage_interval_holds_the_value_of_other_samples():
    """Against the mean over samples of this size: coverage depends on the size itself."""
    found = [coverage_and_density(rows(2 * s, 40, mean=0.8), rows(2 * s + 1, 40))[0] for s in range(200)]
    truth = np.mean([each.value for each in found])
    intervals = [each.share() for each in found]
    hits = np.mean([each.low <= truth <= each.high for each in intervals])
    assert hits >= 0.93  # 95 % stated, standard error 1.5 %


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
def test_coverage_and_fid_do_not_depend_on_where_the_features_lie(seed, scale, shift):
    real, drawn = rows(seed, 12), rows(seed + 1, 12)
    for one, other in zip(
        coverage_and_density(real, drawn), coverage_and_density(real * scale + shift, drawn * scale + shift),
        strict=True,
    ):  # fmt: skip
        assert one.value == pytest.approx(other.value)
    assert fid(real * scale + shift, drawn * scale + shift).value == pytest.approx(
        scale**2 * fid(real, drawn).value, rel=1e-6, abs=1e-6 * scale**2
    )


def test_coverage_of_the_real_pictures_by_themselves_is_whole():
    coverage, density = coverage_and_density(rows(0, 20), rows(0, 20))
    assert coverage.value == 1 and density.value == pytest.approx(1.0, abs=0.3)
    assert coverage.share().low < 0.9  # 20 pictures do not prove it


def test_too_few_pictures_for_coverage_are_refused():
    with pytest.raises(InputError, match="7 real and 2 drawn"):
        coverage_and_density(rows(0, 6), rows(1, 6))
    with pytest.raises(InputError, match="one width"):
        coverage_and_density(rows(0, 9), rows(1, 9, width=3))
    with pytest.raises(InputError, match="for each real one"):
        coverage_and_density(rows(0, 9), rows(1, 8), paired=True)


def with_moments(seed: int, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Rows whose sample mean and sample covariance are exactly these."""
    raw = rows(seed, 50, len(mean))
    raw -= raw.mean(axis=0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw, rowvar=False))).T
    return white @ np.linalg.cholesky(covariance).T + mean


def test_fid_of_two_gaussians_is_the_closed_form():
    """For covariances that commute: |difference of means|^2 + sum (sqrt(a) - sqrt(b))^2."""
    first, second = np.array([4.0, 1.0, 0.25]), np.array([1.0, 9.0, 0.25])
    real = with_moments(0, np.zeros(3), np.diag(first))
    drawn = with_moments(1, np.array([1.0, 2.0, 0.0]), np.diag(second))
    assert fid(real, drawn).value == pytest.approx(
        5 + (np.sqrt(first) - np.sqrt(second)) @ (np.sqrt(first) - np.sqrt(second))
    )


def test_fid_of_one_set_with_itself_is_zero():
    assert fid(rows(0, 30), rows(0, 30)).value == pytest.approx(0, abs=1e-10)


def test_fid_agrees_with_scipys_square_root():
    real, drawn = rows(0, 80, 6) @ rows(9, 6, 6), rows(1, 70, 6, mean=0.3)
    first, second = np.cov(real, rowvar=False), np.cov(drawn, rowvar=False)
    shift = real.mean(axis=0) - drawn.mean(axis=0)
    expected = shift @ shift + np.trace(first + second - 2 * linalg.sqrtm(first @ second).real)
    assert fid(real, drawn).value == pytest.approx(expected, rel=1e-8)


class AsGiven(torch.nn.Module):
    """An "Inception" that hands its input through, so that the library computes on our features."""

    num_features = 6

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def test_fid_agrees_with_torchmetrics_on_the_same_features():
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, drawn = rows(0, 200, 6) @ rows(9, 6, 6), rows(1, 150, 6, mean=0.3)
    theirs = FrechetInceptionDistance(feature=AsGiven()).set_dtype(torch.float64)
    theirs.update(torch.from_numpy(real), real=True)
    theirs.update(torch.from_numpy(drawn), real=False)
    # it keeps sums of squares, ours centres first
    assert fid(real, drawn).value == pytest.approx(theirs.compute().item(), rel=1e-6)


def test_fid_leaves_the_same_groups_out_of_both_sides_of_pairs():
    real = rows(0, 45)
    drawn = real + 0.1 * rows(1, 45)
    found = fid(real, drawn, paired=True)
    kept = np.arange(45) % 20 != 7
    assert found.without[0][7] == pytest.approx(fid(real[kept], drawn[kept]).value)
    assert len(found.without[0]) == 20 and found.n == 45


def test_fid_is_biased_by_its_sample_as_the_warning_says():
    small = [fid(rows(2 * seed, 20, 8), rows(2 * seed + 1, 20, 8)).value for seed in range(20)]
    large = [fid(rows(2 * seed, 500, 8), rows(2 * seed + 1, 500, 8)).value for seed in range(5)]
    assert min(small) > 10 * max(large) > 0


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save all:UserWarning")
@pytest.mark.filterwarnings("ignore:std\\(\\). degrees of freedom:UserWarning")  # of its single split
def test_inception_score_agrees_with_torchmetrics_on_the_same_logits():
    from torchmetrics.image.inception import InceptionScore

    logits = rows(3, 90, 7) * 2
    theirs = InceptionScore(feature=AsGiven(), splits=1).set_dtype(torch.float64)
    theirs.update(torch.from_numpy(logits))
    assert inception_score(special.softmax(logits, axis=1)).value == pytest.approx(theirs.compute()[0].item(), rel=1e-6)


def test_inception_score_has_its_closed_forms():
    certain = np.eye(4)[np.arange(20) % 4]
    assert inception_score(certain).value == pytest.approx(4)  # sure of each, all classes alike
    assert inception_score(np.full((20, 4), 0.25)).value == pytest.approx(1)  # says nothing
    assert inception_score(np.eye(4)[np.zeros(20, int)]).value == pytest.approx(1)  # one class only


def test_inception_score_without_each_picture_agrees_with_a_loop():
    given_NK = special.softmax(rows(4, 12, 5), axis=1)
    loop = [inception_score(np.delete(given_NK, i, 0)).value for i in range(12)]
    found = inception_score(given_NK)
    assert found.without[0] == pytest.approx(np.array(loop))
    half = stats.t.ppf(0.975, 11) * np.sqrt(11 * np.var(loop))
    assert found.estimate(low=1).high == pytest.approx(found.value + half)
    assert found.estimate(low=1).low >= 1


def test_inception_score_refuses_what_are_no_probabilities():
    with pytest.raises(InputError, match="softmax"):
        inception_score(rows(0, 5))


def test_class_probabilities_choose_the_nearest_text():
    classes = np.eye(3)
    found = class_probabilities(classes[[2, 0]], classes, logit_scale=100)
    assert found.argmax(axis=1).tolist() == [2, 0] and found.sum(axis=1) == pytest.approx(np.ones(2))
    assert class_probabilities(classes[[2]], classes, logit_scale=np.log(2)) == pytest.approx(
        np.array([[0.25, 0.25, 0.5]])
    )
