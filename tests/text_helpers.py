"""Real tokenizers, made in memory, and errors compared word for word."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from checkpoint_helpers import SENTENCES, train_bpe
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mdm_interp.errors import UserError

SPECIAL = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "mask": "<mask>"}
WORDS = {f"w{i}": i for i in range(9)} | {token: 9 + i for i, token in enumerate(SPECIAL.values())}
"""Nine words and the special tokens: the 13 tokens of the tests' tiny models."""
BOS, EOS, PAD, MASK = range(9, 13)


def word_tokenizer(*special: str, prepends: bool = False, side: str = "right") -> PreTrainedTokenizerFast:
    """A tokenizer of words between spaces.

    Args:
        special: Which of the special tokens it knows as such: `bos`, `eos`, `pad`, `mask`.
        prepends: Whether it begins every text with BOS itself.
    """
    backend = Tokenizer(WordLevel(WORDS, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if prepends:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    named: dict[str, Any] = {f"{name}_token": SPECIAL[name] for name in special}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side=side, **named)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens, the way GPT-2 has it, and an end token."""
    return PreTrainedTokenizerFast(tokenizer_object=train_bpe(SENTENCES, qwen2=False), eos_token="<|endoftext|>")


@contextlib.contextmanager
def refused(message: str) -> Iterator[None]:
    """Expect a mistake that is answered with this message, word for word."""
    with pytest.raises(UserError) as error:
        yield
    assert str(error.value) == message
    assert len(message) < 500
