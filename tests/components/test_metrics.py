"""Metrics against closed forms, direct double loops, scipy's own statistics, and simulation."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from components.contrastive import make_tiny_clip, save_clip
from components.errors import InputError, NonFiniteError
from components.metrics import ClipEncoder, clip_score, clip_scores, kid, mean_with_bootstrap, proportion_wilson
from components.tokenizer import make_clip_tokenizer


def skewed(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).gamma(1.5, 1.0, n)


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_bootstrap_agrees_with_scipys_bca(confidence):
    values = skewed(1, 60)
    ours = mean_with_bootstrap(values, seed=0, resamples=20_000, confidence=confidence)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, confidence_level=confidence, method="BCa", rng=np.random.default_rng(7)
    ).confidence_interval
    # two sets of 20,000 resamples: their quantiles differ by about 1 % of the interval
    tolerance = 0.03 * (theirs.high - theirs.low)
    assert ours.value == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=tolerance)
    assert ours.high == pytest.approx(theirs.high, abs=tolerance)


def test_bootstrap_interval_covers_the_mean_of_a_skewed_population_as_often_as_it_says():
    repeats, hits = 300, 0
    for repeat in range(repeats):
        estimate = mean_with_bootstrap(skewed(repeat, 50), seed=repeat, resamples=400)
        hits += estimate.low <= 1.5 <= estimate.high
    # 95 % stated; 50 items of a skewed law reach about 93 %. 300 repeats have a standard error of 1.4 %
    assert 0.89 <= hits / repeats <= 0.985


def test_bootstrap_is_a_function_of_the_seed_and_leaves_the_global_generator_alone():
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    first, again, other = (mean_with_bootstrap(skewed(0, 30), seed) for seed in (5, 5, 6))
    assert first == again and first != other
    assert (np.random.get_state()[1] == before).all()


def test_bootstrap_of_equal_values_has_no_width():
    estimate = mean_with_bootstrap([0.25] * 10, seed=0)
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == (0.25, 0.25, 0.25, 10)


def test_bootstrap_refuses_what_has_no_interval():
    with pytest.raises(InputError, match="at least 2"):
        mean_with_bootstrap([1.0], seed=0)
    with pytest.raises(NonFiniteError, match="1 of 3"):
        mean_with_bootstrap([1.0, float("nan"), 2.0], seed=0)


def test_clip_score_is_hundred_times_the_clipped_cosine():
    images = np.array([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]])
    texts = np.array([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    assert clip_scores(images, texts) == pytest.approx([100, 100 / np.sqrt(2), 0])
    estimate = clip_score(images, texts)
    assert estimate.value == pytest.approx(100 * (1 + 1 / np.sqrt(2)) / 3)
    assert estimate.low <= estimate.value <= estimate.high and estimate.n == 3


def test_clip_score_refuses_unmatched_rows():
    with pytest.raises(InputError, match="one caption for each picture"):
        clip_scores(np.ones((3, 4)), np.ones((2, 4)))


def kernel(x: np.ndarray, y: np.ndarray) -> float:
    return float((x @ y / len(x) + 1) ** 3)


def kid_by_loops(real: np.ndarray, generated: np.ndarray, paired: bool) -> float:
    m, n = len(real), len(generated)
    within_real = np.mean([kernel(real[i], real[j]) for i in range(m) for j in range(m) if i != j])
    within_generated = np.mean([kernel(generated[i], generated[j]) for i in range(n) for j in range(n) if i != j])
    across = [kernel(real[i], generated[j]) for i in range(m) for j in range(n) if not (paired and i == j)]
    return float(within_real + within_generated - 2 * np.mean(across))


def jackknife_variance(values: list[float]) -> float:
    return (len(values) - 1) * float(np.var(values))


def test_kid_agrees_with_direct_loops():
    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(7, 5)), rng.normal(0.5, 1, size=(9, 5))
    estimate = kid(real, generated)
    assert estimate.value == pytest.approx(kid_by_loops(real, generated, paired=False))
    assert estimate.n == 7
    variance = jackknife_variance([kid_by_loops(np.delete(real, i, 0), generated, False) for i in range(7)])
    variance += jackknife_variance([kid_by_loops(real, np.delete(generated, i, 0), False) for i in range(9)])
    assert estimate.high - estimate.value == pytest.approx(np.sqrt(variance) * stats.t.ppf(0.975, 6))


def test_kid_of_pairs_agrees_with_direct_loops():
    rng = np.random.default_rng(1)
    real = rng.normal(size=(8, 5))
    generated = real + rng.normal(0.2, 0.3, size=(8, 5))
    estimate = kid(real, generated, paired=True)
    assert estimate.value == pytest.approx(kid_by_loops(real, generated, paired=True))
    without = [kid_by_loops(np.delete(real, i, 0), np.delete(generated, i, 0), True) for i in range(8)]
    assert estimate.high - estimate.value == pytest.approx(np.sqrt(jackknife_variance(without)) * stats.t.ppf(0.975, 7))


@pytest.mark.parametrize("paired", [False, True])
def test_kid_is_unbiased_when_both_sets_come_from_one_distribution(paired):
    values = []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        caption = rng.normal(size=(20, 6)) if paired else np.zeros((1, 6))
        values.append(kid(caption + rng.normal(size=(20, 6)), caption + rng.normal(size=(20, 6)), paired).value)
    standard_error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 3 * standard_error
    assert min(values) < 0


def test_kid_would_be_biased_if_pictures_of_one_caption_were_compared():
    values = []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        caption = rng.normal(size=(20, 6))
        values.append(kid(caption + rng.normal(size=(20, 6)), caption + rng.normal(size=(20, 6))).value)
    assert np.mean(values) < -3 * np.std(values) / np.sqrt(len(values))


def test_kid_interval_covers_the_true_distance():
    def sample(seed: int, n: int, mean: float) -> np.ndarray:
        return np.random.default_rng(seed).normal(mean, 1, size=(n, 4))

    truth = kid(sample(10_000, 4000, 0), sample(10_001, 4000, 0.7)).value
    hits = 0
    for seed in range(200):
        estimate = kid(sample(2 * seed, 40, 0), sample(2 * seed + 1, 40, 0.7))
        hits += estimate.low <= truth <= estimate.high
    assert hits / 200 >= 0.9  # 95 % stated, standard error 1.5 %


def test_kid_grows_with_the_distance():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(50, 8))
    values = [kid(real, rng.normal(shift, 1, size=(50, 8))).value for shift in (0, 0.5, 1, 2)]
    assert values == sorted(values)


def test_kid_blocks_do_not_change_the_value(monkeypatch):
    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(2100, 3)), rng.normal(size=(30, 3))  # more than two blocks
    gram = ((real @ generated.T) / 3 + 1) ** 3
    within_real = ((real @ real.T) / 3 + 1) ** 3
    within = ((generated @ generated.T) / 3 + 1) ** 3
    expected = (within_real.sum() - np.trace(within_real)) / (2100 * 2099)
    expected += (within.sum() - np.trace(within)) / (30 * 29) - 2 * gram.mean()
    assert kid(real, generated).value == pytest.approx(expected)


def test_kid_refuses_what_it_cannot_compare():
    with pytest.raises(InputError, match="one width"):
        kid(np.ones((5, 3)), np.ones((5, 4)))
    with pytest.raises(InputError, match="at least 3"):
        kid(np.ones((5, 3)), np.ones((2, 3)))
    with pytest.raises(InputError, match="as many pictures"):
        kid(np.ones((5, 3)), np.ones((4, 3)), paired=True)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (3, 10), (1, 1), (57, 64)])
def test_wilson_interval_agrees_with_scipy(successes, n):
    ours = proportion_wilson(successes, n)
    theirs = stats.binomtest(successes, n).proportion_ci(0.95, "wilson")
    assert (ours.value, ours.n) == (successes / n, n)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


def test_wilson_refuses_impossible_counts():
    for successes, n in ((0, 0), (3, 2), (-1, 4)):
        with pytest.raises(InputError):
            proportion_wilson(successes, n)


CAPTIONS = ["a small red circle", "two large blue squares on a white background"]


@pytest.fixture(scope="module")
def clip_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("clip")
    tokenizer = make_clip_tokenizer(CAPTIONS, 600, 32)
    save_clip(make_tiny_clip(tokenizer, seed=0), tokenizer, directory)
    return directory


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def test_clip_encoder_gives_unit_rows_in_order_whatever_the_batch(clip_directory):
    pictures = [picture(seed) for seed in range(5)]
    whole, split = ClipEncoder(clip_directory), ClipEncoder(clip_directory, batch_size=2)
    features = whole.images(pictures)
    assert features.shape == (5, 64) and features.dtype == np.float32
    assert np.linalg.norm(features, axis=1) == pytest.approx(np.ones(5), abs=1e-5)
    assert split.images(pictures) == pytest.approx(features, abs=1e-5)
    texts = CAPTIONS * 2 + ["a caption of another length altogether, much longer than the others are"]
    assert split.texts(texts) == pytest.approx(whole.texts(texts), abs=1e-5)
    assert whole.texts([]).shape == (0, 64)


def test_clip_encoder_cuts_a_long_caption_instead_of_failing(clip_directory):
    features = ClipEncoder(clip_directory).texts(["red " * 200, "red " * 400])
    assert features[0] == pytest.approx(features[1], abs=1e-6)


@pytest.mark.parametrize("size", [(64, 64), (100, 70), (48, 90)])
def test_clip_preprocessing_agrees_with_transformers(clip_directory, size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    theirs = CLIPImageProcessorPil.from_pretrained(clip_directory)(picture(3, size), return_tensors="np")
    ours = ClipEncoder(clip_directory).preprocessing(picture(3, size))
    assert ours == pytest.approx(np.asarray(theirs["pixel_values"])[0], abs=1e-5)


def test_clip_encoder_identity_follows_weights_and_preprocessing(clip_directory, tmp_path):
    import shutil

    copy = tmp_path / "elsewhere"
    shutil.copytree(clip_directory, copy)
    assert ClipEncoder(copy).identity == ClipEncoder(clip_directory).identity
    settings = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0.4, 0.5, 0.5]}))
    assert ClipEncoder(copy).identity != ClipEncoder(clip_directory).identity


def test_clip_encoder_leaves_the_global_generator_alone(clip_directory):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    ClipEncoder(clip_directory).texts(CAPTIONS)
    assert torch.equal(torch.get_rng_state(), before)


def test_clip_encoder_says_what_is_missing(tmp_path, clip_directory):
    with pytest.raises(InputError, match=r"model\.clip"):
        ClipEncoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match="'bert'"):
        ClipEncoder(tmp_path)
