"""Ranges over runs of tokens."""

from __future__ import annotations

import pytest
import torch

from vqkv.errors import StateError
from vqkv.transforms.page_scale import PageScale


def tokens(count: int = 64, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(count, 2, 16, generator=generator) + torch.arange(16)


def test_each_channel_fills_its_range_in_each_run() -> None:
    z, side = PageScale(tokens=16).forward(tokens())
    runs = z.view(4, 16, 32)
    assert runs.amin(1).min() >= 0 and runs.amax(1).max() <= 1
    assert runs.amin(1).max() < 0.01 and runs.amax(1).min() > 0.99
    assert side.shape == (64, 2 * 32 // 16)


def test_a_header_belongs_to_its_run_alone() -> None:
    x = tokens()
    moved = torch.cat([x[:32], 100 * x[32:]])
    sides = [PageScale(tokens=32).forward(given)[1] for given in (x, moved)]
    assert torch.equal(sides[0][:32], sides[1][:32])
    assert not torch.equal(sides[0][32:], sides[1][32:])


def test_a_channel_that_holds_still() -> None:
    x = torch.full((16, 2, 16), 7.25)
    z, side = PageScale(tokens=16).forward(x)
    torch.testing.assert_close(PageScale(tokens=16).inverse(z, side), x, atol=1e-3, rtol=1e-3)


def test_misuse() -> None:
    with pytest.raises(StateError, match="whole runs of 32 tokens, given 63"):
        PageScale(tokens=32).forward(tokens(63))
    with pytest.raises(StateError, match="given None"):
        PageScale(tokens=32).inverse(tokens(), None)


def test_a_header_that_does_not_share_out_is_padded() -> None:
    scale, x = PageScale(tokens=4), tokens(8)[:, :1, :3]
    z, side = scale.forward(x)
    assert side.shape == (8, scale.side_count(1, 3)) == (8, 2)
    torch.testing.assert_close(scale.inverse(z, side), x, atol=1e-4, rtol=1e-4)
