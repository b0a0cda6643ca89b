"""The E8P grid."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqkv.codebooks.gaussian import gaussian_grid
from vqkv.errors import SchemeError, StateError
from vqkv.quantizers import e8p
from vqkv.quantizers.e8p import E8P, SCALE, E8PConfig

CODES = torch.arange(2**16, dtype=torch.int32).view(-1, 1, 1)


def points() -> torch.Tensor:
    """All points, `[65536, 8]`."""
    return E8P().decode(CODES)[:, 0]


def gaussian(count: int) -> torch.Tensor:
    return torch.randn(count, 1, 8, generator=torch.Generator().manual_seed(0))


def error(x: torch.Tensor) -> float:
    return float((E8P().decode(E8P().encode(x)) - x).square().mean())


def test_points_are_distinct_and_of_the_lattice() -> None:
    """E8: all coordinates whole or all halves of odd numbers, with an even sum."""
    assert len(points().unique(dim=0)) == 2**16
    lattice = points() / SCALE - 0.25
    doubled = (2 * lattice).round()
    torch.testing.assert_close(2 * lattice, doubled)
    halves = doubled % 2
    assert bool((halves == halves[:, :1]).all())
    assert not bool((doubled.sum(1) % 4).any())


def test_every_point_is_its_own_nearest() -> None:
    assert torch.equal(E8P().encode(E8P().decode(CODES)), CODES)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 20))
def test_codes_are_those_of_an_exhaustive_search(seed: int, size: float) -> None:
    x = size * torch.randn(8, 1, 8, generator=torch.Generator().manual_seed(seed))
    found = (E8P().decode(E8P().encode(x)) - x)[:, 0].double().norm(dim=1)
    best = torch.cdist(x[:, 0].double(), points().double()).amin(1)
    torch.testing.assert_close(found, best, rtol=1e-5, atol=1e-5)


def test_long_inputs_are_searched_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = gaussian(50)
    whole = E8P().encode(x)
    monkeypatch.setattr(e8p, "MAX_SCORES", 7 * e8p.PATTERNS)
    assert torch.equal(E8P().encode(x), whole)
    assert E8P().encode(x[:0]).shape == (0, 1, 1)


def test_eight_channels_together_beat_four_at_the_same_rate() -> None:
    x = gaussian(20_000)
    fours = torch.cdist(x.view(-1, 4), gaussian_grid(4, 256)).amin(1).square().mean() / 4
    assert 2**-4 < error(x) < fours, "above the rate-distortion bound, below the smaller grid"


def test_errors_on_gaussians_are_those_that_the_page_states() -> None:
    x = gaussian(40_000)
    pairs = torch.cdist(x.view(-1, 2), gaussian_grid(2, 16)).amin(1).square().mean() / 2
    assert error(x) == pytest.approx(0.091, abs=1e-3)
    assert float(pairs) == pytest.approx(0.108, abs=1e-3)


@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_the_scale_is_the_best_for_gaussians(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = gaussian(20_000)
    best = error(x)
    monkeypatch.setattr(e8p, "SCALE", factor * SCALE)
    assert error(x) > best


def test_misuse() -> None:
    with pytest.raises(SchemeError, match="'e8p' codes 8 channels together, given 4"):
        E8PConfig().stages(4)
    with pytest.raises(StateError, match="no state"):
        E8P().load_state({"codewords": torch.zeros(1)})
