"""Targets against diffusers' schedulers, weights against their closed forms, and the deterministic validation loss."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from components.errors import InputError
from components.models import TextStates
from components.objective import (
    NUM_BANDS,
    Objective,
    loss_weights,
    make_objective,
    noised,
    per_image_losses,
    squared_error,
    timesteps_of,
)

TIMESTEPS_B = torch.tensor([0, 1, 333, 500, 998, 999])


@pytest.fixture
def clean_and_noise() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (len(TIMESTEPS_B), 4, 4, 4)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def ddim(prediction: str) -> DDIMScheduler:
    return DDIMScheduler(beta_schedule="scaled_linear", prediction_type=prediction, clip_sample=False)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noised_and_target_equal_the_scheduler(prediction: str, clean_and_noise: tuple[Tensor, Tensor]) -> None:
    scheduler = ddim(prediction)
    latents, noise = clean_and_noise
    noisy, target = noised(make_objective(prediction, scheduler), latents, noise, TIMESTEPS_B)
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, noise, TIMESTEPS_B), rtol=1e-6, atol=1e-6)
    expected = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, TIMESTEPS_B)
    torch.testing.assert_close(target, expected, rtol=1e-6, atol=1e-6)


def test_noised_by_flow_equals_the_scheduler_and_its_target_leads_back(clean_and_noise: tuple[Tensor, Tensor]) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    latents, noise = clean_and_noise
    timestep_B = scheduler.timesteps[[0, 10, 300, 500, 900, 999]]
    noisy, velocity = noised(make_objective("flow", scheduler), latents, noise, timestep_B)
    torch.testing.assert_close(noisy, scheduler.scale_noise(latents, timestep_B, noise), rtol=1e-6, atol=1e-6)
    sigma = (timestep_B / 1000).view(-1, 1, 1, 1)
    # One straight step along the velocity, from the noise level to zero, is where the picture was.
    torch.testing.assert_close(noisy - sigma * velocity, latents, rtol=1e-5, atol=1e-5)


def test_min_snr_weights_are_the_closed_forms() -> None:
    scheduler = ddim("epsilon")
    alpha = scheduler.alphas_cumprod[TIMESTEPS_B].double()
    snr = alpha / (1 - alpha)
    epsilon = loss_weights(make_objective("epsilon", scheduler, weighting="min_snr", gamma=5.0), TIMESTEPS_B)
    velocity = loss_weights(make_objective("v_prediction", scheduler, weighting="min_snr", gamma=5.0), TIMESTEPS_B)
    torch.testing.assert_close(epsilon.double(), torch.minimum(snr, torch.tensor(5.0)) / snr, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        velocity.double(), torch.minimum(snr, torch.tensor(5.0)) / (snr + 1), rtol=1e-4, atol=1e-6
    )
    # Nothing is capped where the signal is weak: epsilon's weight is one there.
    assert epsilon[-1] == 1


def test_loss_weights_without_weighting_are_one() -> None:
    for prediction, scheduler in (("epsilon", ddim("epsilon")), ("flow", None)):
        assert loss_weights(make_objective(prediction, scheduler), TIMESTEPS_B).tolist() == [1.0] * len(TIMESTEPS_B)


def test_timesteps_of_uniform_levels_are_even_and_within_the_table() -> None:
    level = torch.tensor([0.0, 0.25, 0.9999999999], dtype=torch.float64)
    assert timesteps_of(Objective("epsilon", None), level).tolist() == [0, 250, 999]
    assert timesteps_of(Objective("flow", None), level).tolist() == pytest.approx([0.0, 250.0, 1000.0])


def test_timesteps_of_logit_normal_are_the_sigmoid_of_a_normal() -> None:
    level = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    sigma = timesteps_of(Objective("flow", None, sampling="logit_normal"), level).double() / 1000
    normal = torch.logit(sigma)
    # An even grid of 20,000 quantiles misses the outermost tails only.
    assert abs(normal.mean().item()) < 1e-3
    assert abs(normal.std().item() - 1) < 1e-3
    assert timesteps_of(Objective("flow", None, sampling="logit_normal"), torch.tensor([0.0, 1.0])).isfinite().all()


def test_unknown_names_are_errors_that_list_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"epsilon, v_prediction or flow, found 'sample'"):
        make_objective("sample", ddim("epsilon"))
    with pytest.raises(InputError, match=r"min_snr expects an epsilon or v model"):
        make_objective("flow", None, weighting="min_snr")
    with pytest.raises(InputError, match=r"uniform or logit_normal, found 'beta'"):
        timesteps_of(Objective("flow", None, sampling="beta"), torch.zeros(1))


def test_squared_error_is_a_mean_per_sample_in_fp32() -> None:
    prediction = torch.zeros(2, 1, 2, 2, dtype=torch.bfloat16)
    target = torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 0.0, 0.0, 0.0]]).view(2, 1, 2, 2)
    error = squared_error(prediction, target)
    assert error.dtype == torch.float32
    assert error.tolist() == [1.0, 1.0]


def text_of(rows: list[int]) -> TextStates:
    return TextStates(torch.zeros(len(rows), 1, 1), torch.ones(len(rows), 1, dtype=torch.bool))


def losses(latents: np.ndarray, keys: list[str], predict=None, batch: int = 16) -> np.ndarray:  # type: ignore[no-untyped-def]
    objective = make_objective("epsilon", ddim("epsilon"))
    return per_image_losses(objective, predict or (lambda x, t, text: x * 0.5), latents, keys, text_of, batch)


@pytest.fixture
def pictures() -> tuple[np.ndarray, list[str]]:
    latents = np.random.default_rng(0).standard_normal((7, 4, 4, 4)).astype(np.float32)
    return latents, [f"{index:02x}" * 32 for index in range(7)]


def test_validation_loss_is_the_same_again_and_leaves_every_generator_alone(
    pictures: tuple[np.ndarray, list[str]],
) -> None:
    first = losses(*pictures)
    torch.manual_seed(99)
    np.random.seed(99)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    second = losses(*pictures)
    assert np.array_equal(first, second)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_validation_loss_of_a_picture_does_not_depend_on_batch_or_company(
    pictures: tuple[np.ndarray, list[str]],
) -> None:
    latents, keys = pictures
    whole = losses(latents, keys)
    assert whole.shape == (7, NUM_BANDS)
    np.testing.assert_array_equal(losses(latents, keys, batch=2), whole)
    np.testing.assert_array_equal(losses(latents[4:5], keys[4:5]), whole[4:5])


def test_validation_loss_asks_for_each_band_in_its_own_timesteps(pictures: tuple[np.ndarray, list[str]]) -> None:
    seen: list[Tensor] = []

    def predict(latents_BCHW: Tensor, timestep_B: Tensor, text: TextStates) -> Tensor:
        seen.append(timestep_B)
        return torch.zeros_like(latents_BCHW)

    losses(*pictures, predict)
    bands = torch.cat(seen).view(-1, NUM_BANDS) // 250
    assert torch.equal(bands, torch.arange(NUM_BANDS).expand(7, NUM_BANDS))


def test_validation_loss_ignores_the_training_density_and_weights(pictures: tuple[np.ndarray, list[str]]) -> None:
    weighted = make_objective("epsilon", ddim("epsilon"), "logit_normal", "min_snr", 1.0)
    latents, keys = pictures
    found = per_image_losses(weighted, lambda x, t, text: x * 0.5, latents, keys, text_of)
    np.testing.assert_array_equal(found, losses(latents, keys))


def test_validation_loss_of_a_perfect_prediction_is_zero(pictures: tuple[np.ndarray, list[str]]) -> None:
    latents, keys = pictures
    objective = make_objective("epsilon", ddim("epsilon"))
    clean = torch.from_numpy(latents).repeat_interleave(NUM_BANDS, 0)

    def oracle(noisy_BCHW: Tensor, timestep_B: Tensor, text: TextStates) -> Tensor:
        assert objective.alphas_T is not None
        alpha = objective.alphas_T[timestep_B].view(-1, 1, 1, 1)
        return (noisy_BCHW - alpha.sqrt() * clean) / (1 - alpha).sqrt()

    # Near timestep 0 the division by a small noise level magnifies fp32 rounding.
    np.testing.assert_allclose(per_image_losses(objective, oracle, latents, keys, text_of), 0, atol=1e-8)
