"""Models whose attention scores coded keys by tables, against decoding them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cache.compressors import ModelStates, random_ids
from tests.tiny_models import tiny_model
from vqkv.cache import attach
from vqkv.compressor import KVCompressor
from vqkv.geometry import Geometry
from vqkv.kernels import recording
from vqkv.kernels.attend import commuted
from vqkv.scheme_files import scheme_from_dict


def compressor_for(model: Any, stat: str | None = "l2", **keys: Any) -> KVCompressor:
    """Small commuting codes: 3 stages of 8 units, so that a table pays from 18 tokens on."""
    scale = [] if stat is None else [{"type": "token_scale", "stat": stat, "scope": "layer"}]
    scheme = {
        "name": "commuting",
        "keys": {
            "rope": "pre",
            "transforms": scale,
            "grouping": {"type": "whole", "scope": "pairs"},
            "sharing": "head",
            "quantizer": {"type": "rope_commutative", "rate": 1.125, "size": 8, "hard": 1},
            **keys,
        },
        "values": {
            "grouping": {"type": "contiguous", "dim": 4},
            "quantizer": {"type": "product", "code_bits": 5},
        },
        "residency": {"sinks": 3, "window": 10},
    }
    geometry = Geometry.from_model(model)
    compressor = KVCompressor(scheme_from_dict(scheme), geometry)
    return compressor.fit(ModelStates(model, geometry, "pre"))


def logits(model: Any, compressor: KVCompressor, read: Any, ids: torch.Tensor, mask: Any) -> Any:
    """Of the last token, after a prefill and two steps of one token; and the kernels that ran."""
    with attach(model, compressor, read=read) as attached, recording() as ran, torch.no_grad():
        cache = attached.new_cache()
        for stop in (ids.shape[1] - 2, ids.shape[1] - 1, ids.shape[1]):
            start = cache.get_seq_length()
            output = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
    return output.logits[:, -1], [name for name in ran if name.startswith("attend")]


@pytest.mark.parametrize("family", ["llama", "glm", "llama-yarn", "smollm3"])
@pytest.mark.parametrize("stat", ["l2", None])
def test_tables_give_what_decoding_gives(
    family: str, stat: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of different padding, several blocks; within 1e-4 of logits of order 1."""
    monkeypatch.setattr("vqkv.cache.coded_attention.BLOCK_TOKENS", 50)
    model = tiny_model(family, num_key_value_heads=4, max_position_embeddings=512)
    compressor = compressor_for(model, stat)
    ids, mask = random_ids(2, 240), torch.ones(2, 240, dtype=torch.long)
    mask[1, :13] = 0
    expected, _ = logits(model, compressor, "decode", ids, mask)
    found, ran = logits(model, compressor, "attend", ids, mask)
    assert ran == ["attend.commuted"] * 2 * len(compressor.geometry.compressed)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_keys_are_scored_as_codes_where_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one query row; not with two, nor where few tokens are coded."""
    tables: list[int] = []
    build = commuted.product_table

    def counted(q: torch.Tensor, keys: Any) -> torch.Tensor:
        tables.append(q.shape[2])
        return build(q, keys)

    monkeypatch.setattr(commuted, "product_table", counted)
    model = tiny_model("llama", num_key_value_heads=4, max_position_embeddings=512)
    with attach(model, compressor_for(model), read="attend") as attached, torch.no_grad():
        cache = attached.new_cache()
        for count in (70, 1, 160, 2):  # 71 tokens are too few for a page to be coded
            model(random_ids(1, count), past_key_values=cache)
        assert tables == []
        model(random_ids(1, 1), past_key_values=cache)
    assert tables == [1, 1]  # one for each layer


@pytest.mark.parametrize(
    ("keys", "kernel"),
    [
        ({}, "commuted"),
        ({"transforms": [{"type": "token_scale", "stat": "rms"}]}, "commuted"),
        ({"transforms": [{"type": "token_scale", "stat": "minmax"}]}, "naive"),
        ({"transforms": [{"type": "token_scale", "stat": "rms", "group": 8}]}, "naive"),
        ({"transforms": [{"type": "center"}]}, "naive"),
        ({"grouping": {"type": "rope_pairs", "dim": 8}, "sharing": "group"}, "naive"),
    ],
)
def test_only_keys_that_are_scaled_sums_of_units_have_tables(
    keys: dict[str, Any], kernel: str
) -> None:
    model = tiny_model("llama", num_key_value_heads=4, max_position_embeddings=512)
    compressor = compressor_for(model, **keys)
    ids, mask = random_ids(1, 100), torch.ones(1, 100, dtype=torch.long)
    expected, _ = logits(model, compressor, "decode", ids, mask)
    found, ran = logits(model, compressor, "attend", ids, mask)
    assert set(ran) == {f"attend.{kernel}"}
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_heads_that_several_queries_read_are_decoded() -> None:
    model = tiny_model("llama", max_position_embeddings=512)
    compressor = compressor_for(model)
    ids, mask = random_ids(1, 150), torch.ones(1, 150, dtype=torch.long)
    assert set(logits(model, compressor, "attend", ids, mask)[1]) == {"attend.naive"}
