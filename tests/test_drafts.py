"""Drafts: the first stages of the same codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cache.compressors import random_ids
from tests.conftest import make_geometry
from tests.tiny_models import tiny_model
from vqkv.cache import VQCache, attach
from vqkv.codec import Codec
from vqkv.compressor import KVCompressor
from vqkv.drafts import DraftCodec
from vqkv.errors import SchemeError
from vqkv.geometry import Geometry
from vqkv.layouts import Stream
from vqkv.scheme import StreamConfig, merge
from vqkv.scheme_files import load_scheme, scheme_from_dict
from vqkv.states import States

STREAMS: tuple[Stream, ...] = ("keys", "values")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def compressor(model: Any) -> KVCompressor:
    made = KVCompressor(load_scheme("quantspec-8"), Geometry.from_model(model))
    return made.with_residency(sinks=3, window=10)


@pytest.mark.parametrize("stream", STREAMS)
def test_a_draft_reads_the_same_bytes_more_coarsely(
    compressor: KVCompressor, stream: Stream
) -> None:
    x = torch.randn(1, 2, 64, 16, generator=torch.Generator().manual_seed(0))
    draft = compressor.draft(1)
    encoded = compressor.encode(0, stream, x)
    assert torch.equal(draft.encode(0, stream, x).codes, encoded.codes)
    assert draft.bytes_per_token == compressor.bytes_per_token
    full, coarse = (c.decode(0, stream, encoded) for c in (compressor, draft))
    errors = [float((y - x).square().mean()) for y in (full, coarse)]
    # Steps 16 times as wide.
    assert errors[1] == pytest.approx(256 * errors[0], rel=0.1)


def test_a_draft_of_residual_codes_leaves_out_their_last_stages() -> None:
    config = StreamConfig.model_validate(
        {
            "grouping": {"type": "contiguous", "dim": 4},
            "sharing": "layer",
            "quantizer": {"type": "residual", "depth": 3, "code_bits": 3},
        }
    )
    x = torch.randn(200, 2, 8, generator=torch.Generator().manual_seed(0))
    codec = Codec(config, 2, 8).fit(States.of(x), samples=200)
    encoded = codec.encode(x)
    decoded = [DraftCodec(codec, stages).decode(encoded) for stages in (1, 2, 3)]
    assert torch.equal(decoded[2], codec.decode(encoded))
    errors = [float((y - x).square().mean()) for y in decoded]
    assert errors == sorted(errors, reverse=True) and len(set(errors)) == 3


def test_a_cache_and_its_draft_share_memory(model: Any, compressor: KVCompressor) -> None:
    ids = random_ids(1, 200)
    cache = VQCache(compressor, model.config)
    with torch.no_grad():
        model(ids[:, :150], past_key_values=cache)
        draft = cache.draft(1)
        for index, layer in cache.coded_layers.items():
            mine, its = layer.tensors(), draft.coded_layers[index].tensors()
            assert all(mine[name].data_ptr() == its[name].data_ptr() for name in mine)
            keys, coarse = layer.read(0, 150)[0], draft.coded_layers[index].read(0, 150)[0]
            assert torch.equal(keys[:, :, 128:], coarse[:, :, 128:])
            assert not torch.equal(keys[:, :, :128], coarse[:, :, :128])
        # What the draft goes on with is its own.
        expected = model(ids[:, 150:], past_key_values=cache.draft(1)).logits
        assert torch.equal(model(ids[:, 150:], past_key_values=draft).logits, expected)
        assert (draft.get_seq_length(), cache.get_seq_length()) == (200, 150)
        alone = VQCache(compressor, model.config)
        model(ids[:, :150], past_key_values=alone)
        after = model(ids[:, 150:], past_key_values=cache).logits
        assert torch.equal(after, model(ids[:, 150:], past_key_values=alone).logits)
    assert not torch.equal(after, expected)


def test_keys_before_rope_take_an_attachment_of_the_draft(model: Any) -> None:
    values = load_scheme("quantspec-8").to_dict()["values"]
    scheme = {"name": "pre", "keys": {"rope": "pre", **values}, "values": values}
    compressor = KVCompressor(scheme_from_dict(scheme), Geometry.from_model(model))
    compressor = compressor.with_residency(window=0)
    ids = random_ids(1, 140)
    with torch.no_grad():
        with attach(model, compressor) as attached:
            cache = attached.new_cache()
            model(ids[:, :128], past_key_values=cache)
        draft = cache.draft(1)
        with attach(model, draft.compressor) as attached:
            alone = attached.new_cache()
            model(ids[:, :128], past_key_values=alone)
            expected = model(ids[:, 128:], past_key_values=alone).logits
            logits = model(ids[:, 128:], past_key_values=draft).logits
    assert torch.equal(logits, expected) and draft.get_seq_length() == 140


@pytest.mark.parametrize(
    ("changes", "stages", "message"),
    [
        ({}, 2, "a draft leaves out some of the 2 stages that codes have, given 2 to read"),
        ({}, 0, "given 0 to read"),
        (
            {"values": {"quantizer": {"type": "identity"}}},
            1,
            "values of layer 0: no stage of IdentityQuantizer can be left out",
        ),
        (
            {
                "values": {
                    "predictor": {"type": "linear", "sources": [{"stream": "keys", "back": 0}]}
                }
            },
            1,
            "values of layer 0: its codes are of what full reconstructions",
        ),
    ],
)
def test_drafts_that_there_are_not(changes: dict[str, Any], stages: int, message: str) -> None:
    scheme = scheme_from_dict(merge(load_scheme("quantspec-8").to_dict(), changes))
    with pytest.raises(SchemeError, match=message):
        KVCompressor(scheme, make_geometry()).draft(stages)
