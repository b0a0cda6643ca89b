"""Texts, cut into windows of tokens that a model runs on one at a time.

A window is a text of its own: positions start at 0 and it sees nothing of the window before it.
So where a tokenizer begins every text with a beginning-of-sequence token, as Llama's and Gemma's
do, every window begins with one, and it counts as one of the window's tokens. No other special
token is added.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from vqkv.attention import most_positions
from vqkv.errors import ModelError, TextError

#: Tokens that a cut through the text may change, with a wide margin.
_CUT_TOKENS = 64


@dataclass(frozen=True)
class Text:
    """A text and where it comes from: the file's name without folders, and its SHA-256."""

    name: str
    content: str
    sha256: str


def read_text(path: str | Path) -> Text:
    """Read a text file.

    Raises:
        TextError: it is missing, unreadable, not UTF-8, or empty.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TextError(f"text {str(path)!r} cannot be read: {error.strerror}") from error
    try:
        content = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(
            f"text {str(path)!r} is not UTF-8: byte 0x{data[error.start]:02x} at {error.start} "
            f"({error.reason}); convert it to UTF-8"
        ) from error
    if not content.strip():
        raise TextError(f"text {str(path)!r} is empty")
    return Text(path.name, content, hashlib.sha256(data).hexdigest())


def check_context(config: PreTrainedConfig, context: int) -> None:
    """Refuse windows longer than a model.

    Raises:
        ModelError: the model has no room for `context` tokens.
    """
    longest = most_positions(config)
    if longest is not None and context > longest:
        raise ModelError(
            f"{config.model_type}: windows of {context} tokens are longer than the model's "
            f"{longest} positions: choose a context up to {longest}"
        )


def text_windows(
    tokenizer: PreTrainedTokenizerBase,
    text: Text | str | Path,
    tokens: int,
    context: int,
    skip: int = 0,
) -> list[torch.Tensor]:
    """Windows `[T]` (int64) of `tokens` tokens in all: `context` each, the last one what is left.

    Args:
        tokenizer: the model's.
        text: a text, or the path of one.
        tokens: that the model will run on, leading special tokens included.
        context: tokens of a window.
        skip: tokens to leave out at the start of the text.

    Raises:
        TextError: the text cannot be read or is too short, or the numbers make no windows.
    """
    if not isinstance(text, Text):
        text = read_text(text)
    leading = _leading_tokens(tokenizer)
    if tokens < 1 or skip < 0 or context <= len(leading):
        raise TextError(
            f"windows need tokens from 1, context from {len(leading) + 1} and skip from 0; given "
            f"tokens {tokens}, context {context}, skip {skip}"
        )
    lengths = [min(context, tokens - start) for start in range(0, tokens, context)]
    needed = skip + sum(length - len(leading) for length in lengths)
    ids = _text_tokens(tokenizer, text.content, needed)
    if len(ids) < needed:
        skipped = f" after the first {skip}" if skip else ""
        raise TextError(
            f"text {text.name!r} has {len(ids)} tokens, needed are {needed}: {tokens} in windows "
            f"of {context}{skipped}. Give a longer text or ask for fewer tokens"
        )
    windows = []
    start = skip
    for length in lengths:
        stop = start + length - len(leading)
        windows.append(torch.tensor(leading + ids[start:stop], dtype=torch.int64))
        start = stop
    return windows


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], tokens: int, context: int
) -> list[torch.Tensor]:
    """Windows of several texts, text by text.

    Each text gives an equal share of `tokens`; what does not divide goes to the first texts, one
    token each.

    Raises:
        TextError: no texts, fewer tokens than texts, or a text is too short for its share.
    """
    if not texts:
        raise TextError("calibration needs at least one text, given none")
    if tokens < len(texts):
        raise TextError(f"{len(texts)} texts need at least one token each, given {tokens}")
    share, rest = divmod(tokens, len(texts))
    return [
        window
        for index, text in enumerate(texts)
        for window in text_windows(tokenizer, text, share + (index < rest), context)
    ]


def _leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text: `[BOS]` or nothing."""
    bos = tokenizer.bos_token_id
    first, bare = (_ids(tokenizer, "a", special=special)[0] for special in (True, False))
    return [bos] if bos is not None and first == bos != bare else []


def _text_tokens(tokenizer: PreTrainedTokenizerBase, content: str, needed: int) -> list[int]:
    """The first tokens of a text, `needed` if it has them.

    Tokenizing a whole library for a few thousand tokens would take long and much memory, so this
    tokenizes a beginning of the text that is amply long.
    """
    characters = 8 * (needed + _CUT_TOKENS)
    while True:
        ids = _ids(tokenizer, content[:characters], special=False)
        if characters >= len(content) or len(ids) >= needed + _CUT_TOKENS:
            return ids[:needed]
        characters *= 2


def _ids(tokenizer: PreTrainedTokenizerBase, content: str, *, special: bool) -> list[int]:
    # Not verbose: it would warn that the text is longer than the model's context.
    encoded = tokenizer(content, add_special_tokens=special, verbose=False)
    return list(encoded["input_ids"])
