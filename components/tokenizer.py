"""Byte-level BPE tokenizers trained on captions, in the formats CLIP and Qwen models read.

Every byte is in the vocabulary, so a caption in any language can be encoded; frequent words become one token.
The special tokens come last: CLIP pools the state of the end token, found by id or by the largest id.
"""

from collections.abc import Collection, Iterable
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_clip_tokenizer(captions: Collection[str], vocab_size: int, max_tokens: int) -> Any:
    """Return a transformers CLIPTokenizer; `max_tokens` includes the start and end tokens."""
    from transformers import CLIPTokenizer

    start, end = "<|startoftext|>", "<|endoftext|>"
    learned, merges = _train(_clip_words(captions), vocab_size - 2, suffix="</w>")
    vocab = {token: index for index, token in enumerate([*learned, start, end])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_tokens)


def make_qwen_tokenizer(captions: Collection[str], vocab_size: int, max_tokens: int) -> Any:
    """Return a transformers Qwen2Tokenizer with a chat template; `max_tokens` includes the template."""
    from transformers import Qwen2Tokenizer

    learned, merges = _train(captions, vocab_size - 3, suffix="")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: index for index, token in enumerate([*learned, *special])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=merges, model_max_length=max_tokens, extra_special_tokens=special[1:]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _clip_words(captions: Collection[str]) -> Iterable[str]:
    """CLIP's tokenizer drops white space before it merges, so it is trained on words alone."""
    return (caption.lower() for caption in captions)


def _train(captions: Iterable[str], vocab_size: int, suffix: str) -> tuple[list[str], Any]:
    """Learn merges; return the vocabulary (every byte first, then merged pieces) and the merges in order."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=suffix, continuing_subword_prefix=""))
    split = [pre_tokenizers.WhitespaceSplit()] if suffix else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # The trainer only knows the word ends it has seen, numbered in the order of a hash table, by which it breaks ties.
    # Given as special tokens they have fixed numbers, count towards the size, and no last letter is unknown later.
    ends = [letter + suffix for letter in alphabet] if suffix else []
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=ends,
        initial_alphabet=alphabet,
        end_of_word_suffix=suffix,
        show_progress=False,
        min_frequency=1,
    )
    tokenizer.train_from_iterator(captions, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in trained["merges"]]
    pieces = [*alphabet, *ends, *("".join(merge) for merge in merges)]
    return list(dict.fromkeys(pieces)), merges
