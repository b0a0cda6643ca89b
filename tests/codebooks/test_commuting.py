"""Units whose sums are codewords: EM of one stage."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqkv.codebooks.commuting import (
    HARD_ROWS,
    codeword,
    distortion,
    hard_step,
    learn_stage,
    m_step,
    nearest,
    soft_step,
    turned,
)
from vqkv.codebooks.em import EMConfig


def vectors(count: int, books: int = 2, dim: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, books, dim, generator=torch.Generator().manual_seed(seed))


def test_a_quarter_turn_is_multiplication_by_i() -> None:
    x = vectors(3)
    z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    assert torch.equal(torch.view_as_real(1j * z).flatten(-2), turned(x))


def test_the_nearest_sum_of_two_units_is_found() -> None:
    units = vectors(8, seed=1).transpose(0, 1)
    x = vectors(50)
    every = torch.arange(64)
    for book in range(2):
        all_words = codeword(every[:, None].expand(-1, 2), units)[:, book]
        expected = torch.cdist(x[:, book], all_words).argmin(1)
        assert torch.equal(nearest(x, units)[:, book].long(), expected)


def test_hard_steps_add_up_over_blocks() -> None:
    x, units = vectors(HARD_ROWS + 300), vectors(8, seed=1).transpose(0, 1)
    weights = torch.rand(len(x), 2, generator=torch.Generator().manual_seed(2)).double()
    codes = nearest(x, units)
    mass, sums = hard_step(x, codes, units, weights)
    parts = [
        hard_step(x[part], codes[part], units, weights[part])
        for part in (slice(0, 1000), slice(1000, None))
    ]
    torch.testing.assert_close(mass, parts[0][0] + parts[1][0])
    torch.testing.assert_close(sums, parts[0][1] + parts[1][1], rtol=1e-4, atol=1e-3)
    # Of a few by hand: samples by the first index, less the turned ones by the second.
    few = slice(0, 3)
    _, found = hard_step(x[few], codes[few], units, weights[few])
    expected = torch.zeros_like(found)
    for row in range(3):
        for book in range(2):
            code, weighted = int(codes[row, book]), (x[row, book] * weights[row, book]).double()
            expected[book, code // 8] += weighted
            expected[book, code % 8] -= turned(weighted)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000))
def test_at_zero_temperature_an_m_step_never_raises_distortion(seed: int) -> None:
    x = vectors(60, dim=4, seed=seed)
    weights = torch.rand(60, 2, generator=torch.Generator().manual_seed(seed)).double()
    units = vectors(4, dim=4, seed=seed + 1).transpose(0, 1)
    codes = nearest(x, units)
    before = distortion(x, codes, units, weights)
    moved = m_step(*hard_step(x, codes, units, weights), units)
    same_codes = distortion(x, codes, moved, weights)
    assert same_codes <= before * (1 + 1e-5) + 1e-6
    assert distortion(x, nearest(x, moved), moved, weights) <= same_codes * (1 + 1e-5) + 1e-6


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000))
def test_a_cold_soft_step_is_the_hard_one(seed: int) -> None:
    x = vectors(60, dim=4, seed=seed)
    weights = torch.rand(60, 2, generator=torch.Generator().manual_seed(seed)).double()
    units = vectors(4, dim=4, seed=seed + 1).transpose(0, 1)
    soft = soft_step(x, units, weights, 1e-9)
    hard = hard_step(x, nearest(x, units), units, weights)
    for one, other in zip(soft, hard, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_mass_of_a_soft_step_is_that_of_the_samples() -> None:
    x, weights = vectors(300), torch.rand(300, 2).double()
    mass, _ = soft_step(x, vectors(8, seed=1).transpose(0, 1), weights, 0.5)
    torch.testing.assert_close(mass.sum((1, 2)), weights.sum(0), atol=1e-3, rtol=1e-5)


def test_the_m_step_finds_units_that_made_the_data() -> None:
    units = vectors(4, books=1, seed=3).transpose(0, 1)
    codes = torch.randint(16, (2000, 1), generator=torch.Generator().manual_seed(0))
    x, weights = codeword(codes, units), torch.ones(2000, 1).double()
    found = m_step(*hard_step(x, codes, units + 0.01, weights), units)
    assert distortion(x, codes, found, weights) < 1e-6


def test_a_unit_without_samples_stays_where_it_is() -> None:
    units = vectors(4, books=1, seed=3).transpose(0, 1)
    codes = torch.randint(3, (500, 1)) * 5  # (0, 0), (1, 1), (2, 2): never unit 3
    x, weights = codeword(codes, units), torch.ones(500, 1).double()
    moved = m_step(*hard_step(x, codes, units, weights), units)
    torch.testing.assert_close(moved[:, 3], units[:, 3])


def test_health_tells_how_far_the_last_iteration_still_came() -> None:
    x, weights = vectors(800), torch.ones(800, 2).double()

    def learned(hard: int) -> tuple[torch.Tensor, tuple[float, ...], float]:
        units, codes, health = learn_stage(
            x,
            weights,
            8,
            EMConfig(iterations=4, hot=0.1, cold=0.02),
            draw=200,
            hard=hard,
            generator=torch.Generator().manual_seed(0),
        )
        assert health.last_gain is not None
        assert torch.equal(codes, nearest(x, units))
        return units, health.inertia, health.last_gain

    units, inertia, gain = learned(2)
    assert len(inertia) == 3
    assert sorted(inertia, reverse=True) == list(inertia)
    assert inertia[-1] == distortion(x, nearest(x, units), units, weights)
    assert gain == 1 - inertia[-1] / inertia[-2]
    _, longer, settled = learned(30)
    assert longer[:3] == inertia
    assert settled < gain / 4
