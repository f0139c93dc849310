"""Byte-level tokenizers: any language can be encoded, and special tokens come last."""

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.tokenizer import make_clip_tokenizer, make_qwen_tokenizer

CAPTIONS = ["a red circle", "a blue square", "two small green triangles on white"]
CAPTIONS_OF_THE_WORLD = [
    "un cœur rouge",
    "красный круг на белом фоне",
    "赤い丸、白い背景",
    "دائرة حمراء",
    "लाल वृत्त",
    "빨간 동그라미",
    "❤️ 🧑‍🚀 emoji",
    "a\u0301 combining",
]


@pytest.fixture(scope="module")
def clip() -> Any:
    return make_clip_tokenizer(CAPTIONS, vocab_size=700, max_tokens=24)


@pytest.fixture(scope="module")
def qwen() -> Any:
    return make_qwen_tokenizer(CAPTIONS, vocab_size=400, max_tokens=200)


@pytest.mark.parametrize("caption", CAPTIONS_OF_THE_WORLD)
def test_clip_encodes_any_language_without_unknown_tokens(clip: Any, caption: str) -> None:
    ids = clip(caption).input_ids
    decoded = clip.decode(ids, skip_special_tokens=True)
    # CLIP lowers letters, normalizes accents and drops the spacing of punctuation.
    expected = unicodedata.normalize("NFC", caption.lower())
    assert decoded.replace(" ", "") == expected.replace(" ", "")


@pytest.mark.parametrize("caption", CAPTIONS_OF_THE_WORLD)
def test_qwen_round_trips_any_language(qwen: Any, caption: str) -> None:
    ids = qwen(caption).input_ids
    assert qwen.decode(ids) == unicodedata.normalize("NFC", caption)


@settings(max_examples=50, deadline=None)
@given(caption=st.text(st.characters(exclude_categories=("Cs",)), max_size=12))
def test_qwen_never_meets_an_unknown_character(qwen: Any, caption: str) -> None:
    if "<|" not in caption:
        assert qwen.decode(qwen(caption).input_ids) == unicodedata.normalize("NFC", caption)


def test_clip_special_tokens_come_last(clip: Any) -> None:
    vocabulary = clip.get_vocab()
    assert vocabulary["<|startoftext|>"] == len(vocabulary) - 2
    assert vocabulary["<|endoftext|>"] == len(vocabulary) - 1
    ids = clip("a red circle").input_ids
    assert ids[0] == clip.bos_token_id and ids[-1] == clip.eos_token_id == max(ids)


def test_qwen_special_tokens_come_last(qwen: Any) -> None:
    vocabulary = qwen.get_vocab()
    last = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert [vocabulary[token] for token in last] == list(range(len(vocabulary) - 3, len(vocabulary)))


def test_frequent_words_become_one_token(clip: Any, qwen: Any) -> None:
    assert len(clip("red circle").input_ids) == 4
    assert len(qwen("circle").input_ids) < len("circle")


def test_vocabulary_stays_within_the_asked_size() -> None:
    captions = [f"word{index} other{index * 7}" for index in range(300)]
    assert len(make_clip_tokenizer(captions, vocab_size=600, max_tokens=16)) <= 600
    assert len(make_qwen_tokenizer(captions, vocab_size=320, max_tokens=16)) <= 320


def test_captions_longer_than_the_limit_are_cut_and_keep_their_end(clip: Any) -> None:
    batch = clip(["red " * 100], padding="max_length", truncation=True, max_length=clip.model_max_length)
    assert len(batch.input_ids[0]) == 24
    assert batch.input_ids[0][-1] == clip.eos_token_id


def test_qwen_chat_template_ends_where_the_answer_begins(qwen: Any) -> None:
    messages = [{"role": "user", "content": "a red circle"}]
    text = qwen.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\na red circle<|im_end|>\n<|im_start|>assistant\n"
    ids = qwen(text).input_ids
    assert ids[0] == qwen.convert_tokens_to_ids("<|im_start|>")
    assert ids.count(qwen.convert_tokens_to_ids("<|im_end|>")) == 1


@pytest.mark.parametrize("kind", ["clip", "qwen"])
def test_saved_tokenizer_reads_the_same(kind: str, clip: Any, qwen: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    made = {"clip": clip, "qwen": qwen}[kind]
    made.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for caption in [*CAPTIONS, *CAPTIONS_OF_THE_WORLD]:
        assert loaded(caption).input_ids == made(caption).input_ids
    assert loaded.model_max_length == made.model_max_length


@pytest.mark.parametrize("make", [make_clip_tokenizer, make_qwen_tokenizer])
def test_learning_is_deterministic_although_many_merges_are_equally_frequent(make: Callable[..., Any]) -> None:
    # Hash tables of the trainer are seeded anew each time: eight runs would not agree by luck.
    learned = [make(CAPTIONS, 700, 16).get_vocab() for _ in range(8)]
    assert all(vocabulary == learned[0] for vocabulary in learned)
