"""Attention on codes and what is folded around them, against attention on decoded states."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.conftest import make_geometry
from tests.test_compressor import RandomStates
from vqkv.compressor import KVCompressor
from vqkv.folding import FoldedLayer
from vqkv.kernels import using
from vqkv.kernels.attend.codes import AttendLayout, Coded, Plane, attend_codes
from vqkv.kernels.attend.rest import Rest, attend_rest
from vqkv.scheme_files import scheme_from_dict

TOKENS, HEADS, GROUP, DIM = 512, 2, 3, 16
PRODUCT = {"type": "product", "code_bits": 8, "learner": {"type": "kmeans", "iterations": 1}}
RESIDUAL = {**PRODUCT, "type": "residual", "depth": 2}


def fitted(keys: dict[str, Any], values: dict[str, Any]) -> KVCompressor:
    stream = {"grouping": {"type": "contiguous", "dim": 4}, "quantizer": PRODUCT}
    geometry = make_geometry(kv_heads=HEADS, query_heads=HEADS * GROUP, head_dim=DIM)
    given = {"name": "x", "keys": {"rope": "post", **stream, **keys}, "values": stream | values}
    compressor = KVCompressor(scheme_from_dict(given), geometry)
    return compressor.fit(RandomStates(geometry, TOKENS))


CHAINS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "strided": ({"grouping": {"type": "strided", "dim": 4}}, {}),
    "scaled": ({"transforms": [{"type": "channel_scale"}]}, {"transforms": [{"type": "center"}]}),
    "rotated": ({"transforms": [{"type": "spectral"}]}, {"transforms": [{"type": "spectral"}]}),
    "hadamard": ({"transforms": [{"type": "hadamard"}]}, {"quantizer": RESIDUAL}),
    "shared": ({"sharing": "head"}, {"sharing": "layer"}),
    # As many subspaces as heads.
    "subspaces": (
        {"sharing": "subspace", "grouping": {"type": "contiguous", "dim": 8}},
        {"sharing": "subspace"},
    ),
    "predicted": (
        {"transforms": [{"type": "center"}, {"type": "spectral"}]},
        {
            "predictor": {
                "type": "linear",
                "scope": "head",
                "sources": [{"stream": "keys", "back": 0}],
            },
            "transforms": [{"type": "spectral"}],
        },
    ),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_folded_attention_is_attention_on_decoded_states(chain: str) -> None:
    compressor = fitted(*CHAINS[chain])
    states = RandomStates(compressor.geometry, TOKENS)
    keys, values = (states.tensor(0, s).transpose(0, 1)[None] for s in ("keys", "values"))
    key_codes = compressor.encode(0, "keys", keys)
    k = compressor.decode(0, "keys", key_codes)
    sources = [k] if compressor.sources(0, "values") else []
    value_codes = compressor.encode(0, "values", values, sources)
    v = compressor.decode(0, "values", value_codes, sources=sources)
    query = torch.randn(1, HEADS * GROUP, 2, DIM, generator=torch.Generator().manual_seed(1)) / 3
    scores = query @ k.repeat_interleave(GROUP, 1).transpose(2, 3)
    expected = scores.softmax(-1) @ v.repeat_interleave(GROUP, 1)

    folded = compressor.folded(0)
    assert isinstance(folded, FoldedLayer)
    coded = Coded(
        Plane(key_codes.codes.transpose(0, 1)[None], folded.keys.codewords),
        Plane(value_codes.codes.transpose(0, 1)[None], folded.values.codewords),
        start=torch.zeros(1, dtype=torch.int32),
        stop=torch.full((1,), TOKENS, dtype=torch.int32),
        key_sums=folded.predicts,
        order=folded.keys.order,
    )
    layouts = AttendLayout(*(compressor.codec(0, s).layout for s in ("keys", "values")))
    with using(attend_codes="naive"):
        partial = attend_codes(folded.query(query), coded, layouts)
    whole = folded.shifted(partial, query)
    torch.testing.assert_close(whole.lse, scores.logsumexp(-1), atol=2e-4, rtol=2e-4)
    nothing = keys[:, :, :0], values[:, :, :0]
    rest = Rest(folded.output_map, folded.output_bias, nothing, nothing)
    output = attend_rest(query, whole, rest)
    torch.testing.assert_close(output, expected, atol=2e-4, rtol=2e-4)


def test_diagonal_maps_go_into_the_codewords_and_rotations_do_not() -> None:
    for chain, dense in (("scaled", False), ("strided", False), ("rotated", True)):
        folded = fitted(*CHAINS[chain]).folded(0)
        assert isinstance(folded, FoldedLayer)
        assert (folded.keys.order is None) == dense
        assert (folded.keys.mean is not None) == dense


def test_pairs_stay_neighbours_before_rope() -> None:
    folded = fitted({"rope": "pre", "grouping": {"type": "rope_pairs", "dim": 4}}, {}).folded(0)
    assert isinstance(folded, FoldedLayer) and folded.pairs is not None
    assert folded.keys.order is not None
    # Half-split pairs (0, 8), (1, 9), ...
    assert folded.keys.order[0].tolist() == [c for i in range(8) for c in (i, i + 8)]
    assert folded.pairs[0].tolist() == list(range(8))


def test_drafts_are_decoded_to_be_read() -> None:
    draft = fitted({"quantizer": RESIDUAL}, {"quantizer": RESIDUAL}).draft(1)
    assert "a draft reads some of a code's stages" in str(draft.folded(0))


def test_codes_of_whole_pairs_in_a_metric_become_plain_channels() -> None:
    keys = {
        "rope": "pre",
        "transforms": [{"type": "pair_metric", "dim": 4}],
        "quantizer": {**PRODUCT, "type": "joint_product"},
    }
    compressor = fitted(keys, {})
    folded = compressor.folded(0)
    assert isinstance(folded, FoldedLayer)
    assert folded.keys.order is not None and folded.keys.mean is None
    states = RandomStates(compressor.geometry, TOKENS).tensor(0, "keys").transpose(0, 1)[None]
    encoded = compressor.encode(0, "keys", states)
    expected = compressor.decode(0, "keys", encoded)[0]
    group = torch.arange(DIM // 4)
    for head in range(HEADS):
        read = folded.keys.codewords[head, group, 0, encoded.codes[:, head].long()].flatten(1)
        torch.testing.assert_close(
            read, expected[head][:, folded.keys.order[head]], atol=1e-3, rtol=1e-3
        )


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"rope": "pre", "transforms": [{"type": "spectral"}]}, "mixes channels of several codes"),
        ({"transforms": [{"type": "token_scale"}]}, "token_scale"),
        ({"quantizer": {"type": "identity"}}, "IdentityQuantizer has no table"),
    ],
)
def test_what_does_not_fold_says_why(keys: dict[str, Any], reason: str) -> None:
    assert reason in str(fitted(keys, {}).folded(0))
