"""Means over runs of tokens."""

from __future__ import annotations

import pytest
import torch

from vqkv.errors import StateError
from vqkv.transforms.page_center import PageCenter


def tokens(count: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(count, 2, 16, generator=generator) + torch.arange(16)


def test_each_channel_has_no_mean_left_in_any_run() -> None:
    z, side = PageCenter(tokens=16).forward(tokens())
    assert z.view(4, 16, 32).mean(1).abs().max() < 0.01
    assert side.shape == (64, 32 // 16)


def test_a_header_belongs_to_its_run_alone() -> None:
    x = tokens()
    moved = torch.cat([x[:32], 100 + x[32:]])
    sides = [PageCenter(tokens=32).forward(given)[1] for given in (x, moved)]
    assert torch.equal(sides[0][:32], sides[1][:32])
    assert not torch.equal(sides[0][32:], sides[1][32:])


def test_misuse() -> None:
    with pytest.raises(StateError, match="page_center takes whole runs of 32 tokens, given 63"):
        PageCenter(tokens=32).forward(tokens(63))
    with pytest.raises(StateError, match="page_center needs the side"):
        PageCenter(tokens=32).inverse(tokens(), None)
    with pytest.raises(StateError, match="mean is beyond fp16's 65504, values reach 1e"):
        PageCenter(tokens=32).forward(torch.full((32, 2, 16), 1e6))
