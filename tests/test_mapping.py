"""Streams that are coded in one launch, against one step after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cache.test_fused import PREDICTED, byte_compressor, logits
from tests.kernels.test_encode_decode import able
from tests.test_compressor import RandomStates
from tests.test_folding import CHAINS, RESIDUAL, TOKENS, fitted
from tests.tiny_models import tiny_model
from vqkv.errors import StateError
from vqkv.evaluation.canary import destroyed
from vqkv.kernels import using
from vqkv.kernels.encode.mapped import MappedCodes
from vqkv.scheme import STREAMS

JOINT = {"type": "joint_product", "code_bits": 8, "rounds": 1}
COUPLED = {
    "rope": "pre",
    "transforms": [{"type": "pair_metric", "metric": "query", "dim": 4}],
    "quantizer": JOINT,
}
MAPPED = {name: chain for name, chain in CHAINS.items() if chain[1].get("quantizer") != RESIDUAL}
MAPPED["coupled"] = (COUPLED, {})


@pytest.mark.parametrize("chain", MAPPED)
@pytest.mark.parametrize("kernel", able("encode_mapped"))
def test_mapped_codes_are_those_of_the_chain(kernel: str, chain: str) -> None:
    compressor = fitted(*MAPPED[chain])
    states = RandomStates(compressor.geometry, TOKENS)
    sources: list[torch.Tensor] = []
    for stream in STREAMS:
        x = 3 * states.tensor(0, stream).transpose(0, 1)[None] + 20
        given = sources if compressor.sources(0, stream) else []
        expected = compressor.encode(0, stream, x, given)
        with using(encode_mapped=kernel):
            found = compressor.encode(0, stream, x, given)
        assert isinstance(compressor.mapped(0, stream), MappedCodes)
        assert found.side.shape == expected.side.shape
        assert (found.codes == expected.codes).float().mean() > 0.99
        sources = [compressor.decode(0, stream, expected, sources=given)]


@pytest.mark.parametrize(
    "values, reason",
    [
        ({"quantizer": RESIDUAL}, "ResidualQuantizer does not code head by head"),
        ({"quantizer": {**JOINT, "type": "product", "code_bits": 4}}, "a code is not one byte"),
        ({"transforms": [{"type": "token_scale"}]}, "transforms do not fold: token_scale"),
        ({"grouping": {"type": "across_heads", "dim": 4}}, "heads are mixed"),
    ],
)
def test_what_is_not_mapped_is_coded_all_the_same(values: dict[str, Any], reason: str) -> None:
    values.get("quantizer", {}).pop("rounds", None)
    compressor = fitted({}, values)
    found = compressor.mapped(0, "values")
    assert isinstance(found, str) and reason in found
    x = RandomStates(compressor.geometry, TOKENS).tensor(0, "values").transpose(0, 1)[None]
    with using(encode_mapped="naive"):
        codes = compressor.encode(0, "values", x).codes
    assert torch.equal(codes, compressor.encode(0, "values", x).codes)


def test_codecs_that_code_in_their_own_way_do_so() -> None:
    """The canary must see destroyed codes, whichever kernel would have written them."""
    compressor = destroyed(fitted({}, {}))
    x = RandomStates(compressor.geometry, TOKENS).tensor(0, "keys").transpose(0, 1)[None]
    with using(encode_mapped="naive"):
        assert not compressor.encode(0, "keys", x).codes.any()
    assert compressor.mapped(0, "keys") == "a DestroyingCodec codes in its own way"


def test_sources_of_an_unpredicted_stream_change_nothing() -> None:
    compressor = fitted({}, {})
    x = RandomStates(compressor.geometry, TOKENS).tensor(0, "values").transpose(0, 1)[None]
    with using(encode_mapped="naive"):
        found = compressor.encode(0, "values", x, [x])
    assert torch.equal(found.codes, compressor.encode(0, "values", x).codes)


def test_bad_states_are_refused_as_ever() -> None:
    compressor = fitted(*MAPPED["predicted"])
    x = RandomStates(compressor.geometry, TOKENS).tensor(0, "values").transpose(0, 1)[None]
    with using(encode_mapped="naive"):
        with pytest.raises(StateError, match=r"values of layer 0: it is predicted from 1"):
            compressor.encode(0, "values", x)
        with pytest.raises(StateError, match=r"values of layer 0: states .* hold nan"):
            compressor.encode(0, "values", x.masked_fill(x == x.max(), torch.nan), [x])


@pytest.mark.parametrize("kernel", able("encode_mapped"))
def test_a_model_s_tokens_are_coded_by_it(kernel: str) -> None:
    model: Any = tiny_model("llama", max_position_embeddings=1024)
    compressor = byte_compressor(model, "pre", **PREDICTED)
    sizes, pads = (200, 1, 1), (10, 80)
    expected, _ = logits(model, compressor, "decode", sizes, pads)
    with using(encode_mapped=kernel):
        found, ran = logits(model, compressor, "decode", sizes, pads)
    assert f"encode_mapped.{kernel}" in ran
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
