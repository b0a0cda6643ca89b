"""Continuations with exact and compressed caches."""

from __future__ import annotations

import pytest

from tests.tiny_checkpoint import tiny_text, tiny_tokenizer
from tests.tiny_models import tiny_model
from vqkv.compressor import KVCompressor
from vqkv.errors import TextError
from vqkv.generation import continue_prompt
from vqkv.geometry import Geometry
from vqkv.scheme_files import load_scheme, scheme_from_dict

IDENTITY = {
    "name": "identity",
    "keys": {
        "rope": "pre",
        "grouping": {"type": "contiguous", "dim": 4},
        "quantizer": {"type": "identity"},
    },
    "values": {
        "grouping": {"type": "contiguous", "dim": 4},
        "quantizer": {"type": "identity"},
    },
    "residency": {"sinks": 1, "window": 8},
}


def test_identity_continues_as_the_exact_cache_does() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    compressor = KVCompressor(scheme_from_dict(IDENTITY), Geometry.from_config(model.config))
    prompt = tiny_text(100)
    exact = continue_prompt(model, tokenizer, prompt, 20)
    for read in ("decode", "attend"):
        coded = continue_prompt(model, tokenizer, prompt, 20, compressor=compressor, read=read)
        assert coded.text == exact.text
        assert coded.new_tokens == exact.new_tokens == 20
        assert coded.cache_bytes_exact == exact.cache_bytes_exact


def test_a_compressed_cache_is_smaller() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    compressor = KVCompressor(load_scheme("scalar-2bit"), Geometry.from_config(model.config))
    result = continue_prompt(model, tokenizer, tiny_text(230), 4, compressor=compressor)
    exact = continue_prompt(model, tokenizer, tiny_text(230), 4)
    assert result.cache_bytes < exact.cache_bytes
    assert exact.cache_bytes == 2 * exact.cache_bytes_exact  # this model runs in 32 bits
    assert result.tokens_per_second > 0


def test_an_empty_prompt() -> None:
    with pytest.raises(TextError, match="the prompt is empty"):
        continue_prompt(tiny_model("llama"), tiny_tokenizer(), "", 4)
