"""A tokenizer of one token per character, and schemes small enough for tiny models."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from vqkv.scheme import Scheme
from vqkv.scheme_files import scheme_from_dict

BOS = 1


class StubTokenizer:
    """One token per character, from 2 to 96; begins texts with BOS where told to."""

    def __init__(self, bos: bool = False) -> None:
        self.bos_token_id = BOS
        self._bos = bos
        self.longest_call = 0

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        self.longest_call = max(self.longest_call, len(text))
        leading = [BOS] if self._bos and add_special_tokens else []
        return {"input_ids": leading + [token(character) for character in text]}


def token(character: str) -> int:
    """The stub's token of a character."""
    return 2 + ord(character) % 95


def write_text(path: Path, characters: int, seed: int = 0) -> Path:
    """A text file of random letters."""
    letters = random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz ", k=characters)
    path.write_text("".join(letters))
    return path


def scheme(rope: str = "pre", sinks: int = 2, **changes: Any) -> Scheme:
    """Product codes of 4 channels in 3 bits; a transform for keys."""
    quantizer = {
        "type": "product",
        "code_bits": 3,
        "learner": {"type": "kmeans", "iterations": 3, "backend": "torch"},
    }
    grouping = {"type": "contiguous", "dim": 4}
    return scheme_from_dict(
        {
            "name": "tiny",
            "keys": {
                "rope": rope,
                "transforms": [{"type": "center"}],
                "grouping": grouping,
                "quantizer": quantizer,
            },
            "values": {"grouping": grouping, "quantizer": quantizer},
            "residency": {"sinks": sinks, "window": 64},
            "calibration": {"samples": 150},
            **changes,
        }
    )
