from __future__ import annotations

import pytest
import torch

from vqkv.codebooks.ema import EMAConfig
from vqkv.errors import NotFittedError, SchemeError, StateError
from vqkv.quantizers.product import ProductQuantizer
from vqkv.quantizers.residual import ResidualConfig, ResidualQuantizer


def samples(count: int = 300) -> torch.Tensor:
    return torch.randn(count, 2, 6, generator=torch.Generator().manual_seed(0))


def test_stages_add_up_greedily() -> None:
    x = samples()
    quantizer = ResidualQuantizer(depth=3, code_bits=4)
    quantizer.fit(x)
    codes = quantizer.encode(x)
    assert codes.shape == (300, 2, 3)
    left = x.double()
    books = quantizer.codewords_.double()
    for stage in range(3):
        distances = (left.unsqueeze(2) - books[:, stage]).square().sum(-1)
        chosen = distances.gather(2, codes[..., stage : stage + 1].long())[..., 0]
        assert bool((chosen <= distances.amin(-1) + 1e-4).all())
        left = left - books[torch.arange(2), stage, codes[..., stage].long()]
    torch.testing.assert_close(quantizer.decode(codes).double(), x.double() - left)


def test_one_stage_is_a_product_quantizer() -> None:
    x = samples()
    one = ResidualQuantizer(depth=1, code_bits=4)
    product = ProductQuantizer(code_bits=4)
    assert torch.equal(one.fit(x).encode(x), product.fit(x).encode(x))


def test_bits_and_stages() -> None:
    config = ResidualConfig(depth=8, code_bits=11)
    assert (config.stages(32), config.bits(), config.data_free) == (8, 11, False)


def test_learns_by_ema_too() -> None:
    x = samples()
    quantizer = ResidualQuantizer(depth=2, code_bits=4, learner=EMAConfig(steps=5))
    quantizer.fit(x)
    error = (x - quantizer.decode(quantizer.encode(x))).square().mean()
    assert float(error) < 0.6
    assert len(quantizer.health_) == 2


def test_before_fit() -> None:
    quantizer = ResidualQuantizer(depth=2, code_bits=4)
    with pytest.raises(NotFittedError, match="ResidualQuantizer has not been fitted"):
        quantizer.encode(samples())
    with pytest.raises(NotFittedError, match="ResidualQuantizer has not been fitted"):
        quantizer.prepare(2, 6)


def test_state_of_another_depth() -> None:
    two = ResidualQuantizer(depth=2, code_bits=4).fit(samples())
    with pytest.raises(StateError, match=r"S, K = \(3, 16\), given \(2, 16\)"):
        ResidualQuantizer(depth=3, code_bits=4).load_state(two.state())


def test_settings_out_of_range() -> None:
    for depth, bits in ((0, 4), (2, 0)):
        with pytest.raises(SchemeError, match="greater than or equal to 1"):
            ResidualQuantizer(depth=depth, code_bits=bits)
