"""The floor that codes are set beside."""

from __future__ import annotations

import pytest
import torch

from benchmarks.floor import floor, shared_floor


def test_of_equal_variances_each_bit_takes_three_quarters_off() -> None:
    assert floor(torch.full((4,), 2.0), 4 * 1.5) == pytest.approx(8 / 4**1.5)


def test_of_unequal_ones_the_weak_ones_get_no_bits() -> None:
    # θ = 0.25 gives the strong one ½ log₂(16 / 0.25) = 3 bits and the weak one none.
    assert floor(torch.tensor([16.0, 0.125]), 3) == pytest.approx(0.25 + 0.125)


def test_sharing_bits_lowers_the_floor_by_how_unlike_tokens_are() -> None:
    generator = torch.Generator().manual_seed(0)
    alike = torch.randn(4000, 256, generator=generator, dtype=torch.float64)
    lengths = torch.exp(0.5 * torch.randn(4000, 1, generator=generator, dtype=torch.float64))
    bits = 4 * 256.0  # enough that every token gets some
    plain = floor(alike.square().mean(0), bits)
    assert shared_floor(alike, bits) == pytest.approx(plain, rel=0.02)
    unlike = lengths * alike
    apart = floor(unlike.square().mean(0), bits)
    geometric = lengths.square().log().mean().exp() / lengths.square().mean()
    assert shared_floor(unlike, bits) / apart == pytest.approx(float(geometric), rel=0.05)
