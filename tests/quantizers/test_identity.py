from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqkv.errors import StateError
from vqkv.quantizers.identity import IdentityQuantizer

Name = Literal["float32", "float16", "bfloat16"]


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_values_of_the_type_come_back_bit_for_bit(name: Name) -> None:
    dtype = getattr(torch, name)
    x = (torch.randn(100, 3, 4) * 1e3).to(dtype).float()
    x[0, 0] = torch.tensor([0.0, -0.0, torch.finfo(dtype).max, -torch.finfo(dtype).tiny])
    quantizer = IdentityQuantizer(dtype=name)
    quantizer.prepare(3, 4)
    codes = quantizer.encode(x)
    assert codes.shape == (100, 3, quantizer.config.stages(4))
    assert int(codes.min()) >= 0
    assert int(codes.max()) < 2 ** quantizer.config.bits()
    back = quantizer.decode(codes)
    assert torch.equal(back.view(torch.int32), x.view(torch.int32))


@given(value=st.floats(width=32, allow_nan=False))
def test_any_fp32_value_comes_back(value: float) -> None:
    x = torch.full((1, 1, 1), value)
    quantizer = IdentityQuantizer()
    assert torch.equal(quantizer.decode(quantizer.encode(x)), x)


def test_sixteen_bits_round_once() -> None:
    x = torch.randn(10, 2, 3)
    quantizer = IdentityQuantizer(dtype="bfloat16")
    assert torch.equal(quantizer.decode(quantizer.encode(x)), x.to(torch.bfloat16).float())


def test_there_is_nothing_to_learn() -> None:
    quantizer = IdentityQuantizer()
    assert quantizer.config.data_free
    assert quantizer.fit(torch.zeros(5, 2, 3)).health_ == []
    assert quantizer.state() == {}
    quantizer.load_state({})
    with pytest.raises(StateError, match=r"IdentityQuantizer has no state, given \['codewords'\]"):
        quantizer.load_state({"codewords": torch.zeros(1)})
