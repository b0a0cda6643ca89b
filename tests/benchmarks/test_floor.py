"""The floor that codes are set beside."""

from __future__ import annotations

import pytest
import torch

from benchmarks.floor import floor


def test_of_equal_variances_each_bit_takes_three_quarters_off() -> None:
    assert floor(torch.full((4,), 2.0), 4 * 1.5) == pytest.approx(8 / 4**1.5)


def test_of_unequal_ones_the_weak_ones_get_no_bits() -> None:
    # θ = 0.25 gives the strong one ½ log₂(16 / 0.25) = 3 bits and the weak one none.
    assert floor(torch.tensor([16.0, 0.125]), 3) == pytest.approx(0.25 + 0.125)
