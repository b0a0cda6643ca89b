from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.conftest import make_geometry
from vqkv.compressor import KVCompressor, StateSource
from vqkv.errors import NotFittedError, SchemeError
from vqkv.layouts import Stream
from vqkv.scheme import merge
from vqkv.scheme_files import load_scheme, scheme_from_dict
from vqkv.states import States
from vqkv.truncation import first_stages

RESIDUAL = {"type": "residual", "depth": 4, "code_bits": 3, "learner": {"type": "kmeans"}}


class Random(StateSource):
    def states(self, layer: int, stream: Stream) -> States:
        seed = 2 * layer + (stream == "values")
        generator = torch.Generator().manual_seed(seed)
        return States.of(torch.randn(64, 2, 16, generator=generator))


def unfitted(quantizer: dict[str, Any], **changes: Any) -> KVCompressor:
    streams = {"grouping": {"dim": 8}, "quantizer": quantizer, "sharing": "layer"}
    data = merge(load_scheme("gsrq-1").to_dict(), {"keys": streams, "values": streams})
    return KVCompressor(scheme_from_dict(merge(data, changes)), make_geometry())


@pytest.fixture(scope="module")
def deep() -> KVCompressor:
    return unfitted(RESIDUAL).fit(Random())


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_they_are_what_a_fit_at_that_depth_gives(deep: KVCompressor, depth: int) -> None:
    short = first_stages(deep, depth)
    fitted = unfitted({**RESIDUAL, "depth": depth}).fit(Random())
    assert short.scheme.fingerprint() == fitted.scheme.fingerprint()
    assert short.identity() == fitted.identity()
    assert short.health() == fitted.health()


def test_bits_and_bytes_are_those_of_the_stages_that_are_left(deep: KVCompressor) -> None:
    short = first_stages(deep, 1)
    assert short.nbytes() == deep.nbytes() // 4 == short.planned_side_bytes()
    # Each head: 2 groups of 3-bit codes in a byte, and a 16-bit scale.
    assert short.bits_per_value == pytest.approx((8 + 16) / 16)
    states = torch.randn(1, 2, 5, 16)
    assert short.encode(0, "keys", states).nbytes == 5 * short.bytes_per_token // 4


def test_a_rate_becomes_a_depth_and_overrides_are_cut_too() -> None:
    by_rate = {**RESIDUAL, "depth": None, "rate": 1.5}
    override = {"layers": [1], "values": {"quantizer": {"code_bits": 2, "rate": 1.0}}}
    deep = unfitted(by_rate, layers=[override]).fit(Random())
    stages = {key: codec.layout.segments[0].stages for key, codec in first_stages(deep, 2).codecs()}
    assert set(stages.values()) == {2}
    assert first_stages(deep, 2).codec(1, "values").layout.segments[0].code_bits == 2


def test_what_does_not_nest_is_refused(deep: KVCompressor) -> None:
    with pytest.raises(SchemeError, match=r"keys of layer 0: there are 4 stages.*given 5"):
        first_stages(deep, 5)
    with pytest.raises(NotFittedError):
        first_stages(unfitted(RESIDUAL), 1)
    product = unfitted({"type": "product", "code_bits": 3}).fit(Random())
    with pytest.raises(SchemeError, match="one residual quantizer and no predictor"):
        first_stages(product, 1)
    source = {"type": "copy", "sources": [{"stream": "keys", "back": 0}]}
    predicted = unfitted(RESIDUAL, values={"predictor": source}).fit(Random())
    with pytest.raises(SchemeError, match="values of layer 0: stages nest where"):
        first_stages(predicted, 1)
