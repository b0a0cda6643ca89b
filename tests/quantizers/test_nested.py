"""Nested uniform codes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqkv.errors import SchemeError, StateError
from vqkv.quantizers.nested import Nested, NestedConfig
from vqkv.quantizers.product import ProductQuantizer


def values(seed: int = 0, count: int = 500) -> torch.Tensor:
    return torch.rand(count, 1, 1, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_the_first_stages_say_an_interval(depth: int, bits: int, seed: int) -> None:
    x = values(seed)
    nested = Nested(depth=depth, code_bits=bits)
    codes = nested.encode(x)
    assert codes.dtype == torch.int32
    for stages in range(1, depth + 1):
        decoded = nested.decode(codes[..., :stages])
        assert bool(((decoded - x).abs() <= 2.0 ** -(stages * bits) / 2 + 1e-6).all())


def test_the_first_stage_is_a_uniform_code() -> None:
    x = values()
    uniform = ProductQuantizer(code_bits=4, learner={"type": "uniform", "low": 0.0, "high": 1.0})
    uniform.prepare(1, 1)
    nested = Nested(depth=2, code_bits=4)
    codes = nested.encode(x)
    assert torch.equal(codes[..., :1], uniform.encode(x))
    assert torch.equal(nested.decode(codes[..., :1]), uniform.decode(uniform.encode(x)))


def test_values_beyond_the_range_take_its_ends() -> None:
    nested = Nested(depth=2, code_bits=4)
    codes = nested.encode(torch.tensor([-3.0, 1.0, 7.0]).view(3, 1, 1))
    assert codes.flatten(1).tolist() == [[0, 0], [15, 15], [15, 15]]


def test_misuse() -> None:
    with pytest.raises(SchemeError, match="at most 16 bits, given 3 of 6"):
        Nested(depth=3, code_bits=6)
    with pytest.raises(SchemeError, match="'nested' codes single channels, given dim 4"):
        NestedConfig(depth=2, code_bits=4).stages(4)
    with pytest.raises(StateError, match="no state"):
        Nested(depth=2, code_bits=4).load_state({"codewords": torch.zeros(1)})
