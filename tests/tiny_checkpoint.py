"""A tiny random model with a tokenizer, saved to a folder as `from_pretrained` wants it."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import tiny_model

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "dog", "run", "far", "away")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words to ids; anything else is `<unk>`."""
    vocabulary = {"<pad>": 0, "<bos>": 1, "<unk>": 2, **{w: i for i, w in enumerate(WORDS, 3)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>"
    )


def tiny_text(words: int, seed: int = 0) -> str:
    """Random words of the tokenizer's vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (words,), generator=generator))


def save_tiny_checkpoint(folder: Path, family: str = "llama") -> Path:
    """Write model and tokenizer to `folder`."""
    tiny_model(family).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
