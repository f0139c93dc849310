"""The contrastive loop: its loss against closed forms, and that it learns, saves and loads."""

import itertools
import math

import pytest
import torch
from torch.nn import functional
from transformers import CLIPModel, CLIPTokenizer

from components.contrastive import (
    ContrastivePlan,
    contrastive_loss,
    make_tiny_clip,
    pretrain_clip,
    save_clip,
    sibling_pairs,
    train_clip,
)
from components.emblems import parse_caption
from components.errors import NonFiniteError
from components.tokenizer import make_clip_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    captions = [caption for index in range(8) for caption in sibling_pairs(("base", "drifted"), 0, index, 32)[1]]
    return make_clip_tokenizer(captions, 900, 32)


def unit_rows(*shape: int) -> torch.Tensor:
    return functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(0)), dim=1)


def test_loss_of_distinct_captions_is_symmetric_cross_entropy():
    image_BD, text_BD = unit_rows(4, 8), unit_rows(4, 8).flip(0)
    scale = torch.tensor(math.log(5.0))
    logits = 5 * image_BD @ text_BD.T
    expected = (
        functional.cross_entropy(logits, torch.arange(4)) + functional.cross_entropy(logits.T, torch.arange(4))
    ) / 2
    loss, _ = contrastive_loss(image_BD, text_BD, ["a", "b", "c", "d"], scale)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_equal_captions_are_positives_of_each_other():
    features = torch.eye(3)[[0, 0, 1]]
    loss, accuracy = contrastive_loss(features, features, ["a", "a", "b"], torch.tensor(math.log(100.0)))
    # twins share the target evenly: entropy log 2 for two of three rows, 0 for the third
    assert loss.item() == pytest.approx(2 / 3 * math.log(2), abs=1e-5)
    assert accuracy.item() == 1
    apart, _ = contrastive_loss(features, features, ["a", "c", "b"], torch.tensor(math.log(100.0)))
    pulled = torch.eye(3)
    assert contrastive_loss(pulled, pulled, ["a", "a", "b"], torch.tensor(math.log(100.0)))[0] > apart


def test_accuracy_of_wrong_matches_is_zero():
    loss, accuracy = contrastive_loss(torch.eye(3), torch.eye(3).roll(1, 0), ["a", "b", "c"], torch.tensor(0.0))
    assert accuracy.item() == 0 and loss > math.log(3)


def test_sibling_pairs_are_repeatable_and_differ_in_one_word(tokenizer):
    pixels_BCHW, captions = sibling_pairs(("base",), 7, 3, 16)
    again, same_captions = sibling_pairs(("base",), 7, 3, 16)
    assert torch.equal(pixels_BCHW, again) and captions == same_captions
    assert pixels_BCHW.shape == (16, 3, 64, 64) and pixels_BCHW.min() >= -1 and pixels_BCHW.max() <= 1
    emblems = [parse_caption(caption) for caption in captions]
    assert None not in emblems
    for first, *siblings in (emblems[start : start + 4] for start in range(0, 16, 4)):
        for sibling in siblings:
            changed = [name for name, value in vars(first).items() if vars(sibling)[name] != value]
            assert len(changed) <= 1


def test_a_fresh_clip_is_small_repeatable_and_leaves_the_generator_alone(tokenizer):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = (make_tiny_clip(tokenizer, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [model.visual_projection.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert sum(parameter.numel() for parameter in first.parameters()) < 0.9e6
    assert first.config.text_config.eos_token_id == tokenizer.eos_token_id


def test_a_few_steps_lower_the_loss_and_match_above_chance(tokenizer):
    seen: list[int] = []
    model = make_tiny_clip(tokenizer, seed=0)
    # the same few batches again and again: this tests the loop, not generalisation
    batches = [sibling_pairs(("base",), 0, index, 24) for index in range(2)]
    plan = ContrastivePlan(40, warmup_steps=5)
    history = train_clip(model, tokenizer, itertools.cycle(batches), plan, lambda done: seen.append(done.step))
    first, last = history[:4], history[-4:]
    assert sum(step.loss for step in last) < 0.7 * sum(step.loss for step in first)
    assert sum(step.accuracy for step in last) / 4 > 4 / 24  # chance is 1 in 24
    assert not model.training and seen == list(range(40))


def test_a_loss_that_is_not_finite_stops_before_a_weight_moves(tokenizer):
    model = make_tiny_clip(tokenizer, seed=0)
    with torch.no_grad():
        model.visual_projection.weight.fill_(float("nan"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NonFiniteError, match="step 0"):
        train_clip(model, tokenizer, iter([sibling_pairs(("base",), 0, 0, 8)]), ContrastivePlan(1))
    assert all(torch.equal(value, before[name]) or value.isnan().all() for name, value in model.state_dict().items())


def test_pretrained_directory_opens_in_transformers_and_agrees(tokenizer, tmp_path):
    said: list[str] = []
    accuracy = pretrain_clip(
        tokenizer, lambda index: sibling_pairs(("base",), 0, index, 8), steps=2, directory=tmp_path, say=said.append
    )
    assert 0 <= accuracy <= 1 and said
    model = CLIPModel.from_pretrained(tmp_path, dtype=torch.float32)
    loaded_tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    caption = "a small red circle on a white background"
    assert loaded_tokenizer([caption]).input_ids == tokenizer([caption]).input_ids
    assert model.config.text_config.max_position_embeddings == 32
    assert (tmp_path / "preprocessor_config.json").is_file()
    assert (tmp_path / "model.safetensors").stat().st_size < 2e6


def test_saving_in_half_precision_keeps_the_model_and_its_answers(tokenizer, tmp_path):
    model = make_tiny_clip(tokenizer, seed=0).eval()
    save_clip(model, tokenizer, tmp_path)
    assert model.dtype == torch.float32
    loaded = CLIPModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    pixels_BCHW, _ = sibling_pairs(("base",), 0, 0, 4)
    with torch.inference_mode():
        ours, theirs = (each.get_image_features(pixels_BCHW).pooler_output for each in (model, loaded))
    assert functional.cosine_similarity(ours, theirs).min() > 0.9999  # fp16 keeps 3 digits
