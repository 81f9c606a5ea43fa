"""Tokenizers of the published classes, trained in a moment on a few sentences, so that nothing is downloaded."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from typing import cast

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GemmaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

CORPUS = (
    "a red circle above a blue square",
    "a small green triangle to the left of a large yellow star on a plain ground",
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships.",
    "the clip shows a moving shape while a low tone plays",
)

QWEN_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# Qwen3's template for plain messages: without thinking, the answer opens with an empty block of thoughts.
QWEN_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)

GEMMA_SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")

MISTRAL_SPECIAL_TOKENS = (
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[INST]",
    "[/INST]",
    "[IMG]",
    "[IMG_BREAK]",
    "[IMG_END]",
)

# Mistral Small's template for messages whose content is a list of texts and images.
MISTRAL_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% set tag = 'SYSTEM_PROMPT' if message.role == 'system' else 'INST' %}"
    "{{ '[' + tag + ']' }}"
    "{% for part in message.content %}{{ part.text if part.type == 'text' else '[IMG]' }}{% endfor %}"
    "{{ '[/' + tag + ']' }}"
    "{% endfor %}"
)


def train_bpe(
    special_tokens: list[str], vocab_size: int = 400, corpus: Sequence[str] = CORPUS
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level BPE of at most `vocab_size` entries, and no more than make every word of `corpus` one token.

    Returns:
        (vocab, merges) as `Qwen2Tokenizer(vocab=..., merges=...)` takes them; the special tokens come first, in order.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    return trained["vocab"], [(left, right) for left, right in trained["merges"]]


def qwen2_tokenizer(corpus: Sequence[str] = CORPUS, vocab_size: int = 400) -> Qwen2Tokenizer:
    """The tokenizer of the Qwen text encoders, with Qwen3's chat template and the VL models' vision tokens."""
    vocab, merges = train_bpe(list(QWEN_SPECIAL_TOKENS), vocab_size, corpus)
    return Qwen2Tokenizer(
        vocab=vocab,
        # Annotated as strings, but handed on to a BPE, which takes pairs.
        merges=cast(list[str], merges),
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=list(QWEN_SPECIAL_TOKENS[1:]),
        chat_template=QWEN_CHAT_TEMPLATE,
    )


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of Mistral Small, with its chat template; Pixtral's processor takes it as well."""
    special_tokens = ["<unk>", "<s>", "</s>", "<pad>", *MISTRAL_SPECIAL_TOKENS]
    vocab, merges = train_bpe(special_tokens)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=list(MISTRAL_SPECIAL_TOKENS),
        chat_template=MISTRAL_CHAT_TEMPLATE,
    )


def gemma_tokenizer(corpus: Sequence[str], vocab_size: int = 400) -> GemmaTokenizer:
    """The tokenizer of the Gemma text encoders, which pads on the left and marks spaces instead of splitting at them."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(GEMMA_SPECIAL_TOKENS),
        initial_alphabet=[*string.ascii_letters, *string.digits, *string.punctuation],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    return GemmaTokenizer(
        vocab=trained["vocab"],
        # Annotated as strings, but handed on to a BPE, which takes pairs.
        merges=cast(list[str], [(left, right) for left, right in trained["merges"]]),
        model_max_length=512,
        add_bos_token=True,
    )
