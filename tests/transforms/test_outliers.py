"""Outliers beside the codes."""

from __future__ import annotations

import pytest
import torch

from vqkv.errors import SchemeError, StateError
from vqkv.transforms.outliers import Outliers


def tokens() -> torch.Tensor:
    return torch.randn(50, 2, 16, generator=torch.Generator().manual_seed(0))


def test_the_largest_channels_come_back_whatever_is_coded() -> None:
    transform = Outliers(share=0.1)
    x = tokens()
    z, side = transform.forward(x)
    assert side.shape == (50, transform.side_count(2, 16)) == (50, 6)
    back = transform.inverse(torch.zeros_like(z), side)
    largest = x.flatten(1).abs().topk(3, 1).indices
    torch.testing.assert_close(
        back.flatten(1).gather(1, largest), x.flatten(1).gather(1, largest).half().float()
    )
    assert int((back != 0).sum()) == 3 * 50


def test_the_rest_has_a_smaller_range() -> None:
    z, _ = Outliers(share=0.1).forward(tokens())
    assert bool((z.abs().amax((1, 2)) < tokens().abs().amax((1, 2))).all())


def test_at_least_one_is_kept() -> None:
    assert Outliers(share=0.001).side_count(2, 16) == 2


def test_misuse() -> None:
    with pytest.raises(SchemeError, match="32 heads of 128 channels have 4096"):
        Outliers().check(32, 128)
    with pytest.raises(StateError, match="an outlier is 1e"):
        Outliers().forward(1e6 * torch.ones(1, 2, 16))
    with pytest.raises(StateError, match="given None"):
        Outliers().inverse(tokens(), None)
