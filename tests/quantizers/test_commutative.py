"""Codewords that commute with RoPE."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_models import tiny_model
from vqkv.cache.rope import RotaryAdapter
from vqkv.errors import NotFittedError, SchemeError, StateError
from vqkv.quantizers.commutative import (
    Commutative,
    CommutativeConfig,
    codeword,
    e_step,
    hard_error,
    m_step,
    nearest,
    scores,
    turned,
)
from vqkv.rotation import rope_pairs
from vqkv.scheme_files import load_scheme, scheme_from_dict

DIM = 16


def vectors(count: int = 400, books: int = 2, dim: int = DIM, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, books, dim, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def fitted() -> Commutative:
    quantizer = Commutative(rate=2, size=8)
    quantizer.fit(vectors())
    return quantizer


def test_the_nearest_sum_of_two_units_is_found() -> None:
    units = vectors(8, books=2, seed=1).transpose(0, 1)
    x = vectors(50)
    every = torch.arange(64)
    for book in range(2):
        all_words = codeword(every[:, None].expand(-1, 2), units)[:, book]
        expected = torch.cdist(x[:, book], all_words).argmin(1)
        assert torch.equal(nearest(x, units)[:, book].long(), expected)


def test_a_quarter_turn_is_multiplication_by_i() -> None:
    x = vectors(3)
    z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    assert torch.equal(torch.view_as_real(1j * z).flatten(-2), turned(x))


@pytest.mark.parametrize("family", ["llama", "glm"])
def test_rotating_then_decoding_is_decoding_then_rotating(family: str) -> None:
    """Rotated units decode to rotated keys, at any position: RoPE and codewords commute."""
    adapter = RotaryAdapter(tiny_model(family), [0])
    pairs = rope_pairs(*_form(adapter))
    order = torch.tensor([channel for pair in pairs for channel in pair])
    units = vectors(8, books=1, dim=len(order), seed=2)[:, 0]

    def rotated(x: torch.Tensor, position: int) -> torch.Tensor:
        """Pairs side by side, turned as the model turns them."""
        keys = torch.zeros(1, 1, len(x), 16)
        keys[0, 0][:, order] = x
        tables = adapter.tables(0, torch.full((1, len(x)), position))
        return adapter.rotate(0, keys, tables)[0, 0][:, order]

    codes = torch.arange(64)[:, None]
    for position in (0, 1, 7, 200):
        after = rotated(codeword(codes, units[None])[:, 0], position)
        before = codeword(codes, rotated(units, position)[None])[:, 0]
        torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-5)


def _form(adapter: RotaryAdapter) -> tuple[Any, int]:
    rotation = adapter._rotations[0]
    return rotation.pairing, rotation.rotary_dim


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 100))
def test_scores_from_tables_are_scores_of_decoded_keys(position: int, seed: int) -> None:
    """`⟨q, R_m k⟩` from a table of the query's products with units, one rotation at the end."""
    quantizer = Commutative(rate=4, size=4)
    x = vectors(40, books=1, seed=seed)
    quantizer.fit(x)
    codes = quantizer.encode(x)
    query = vectors(1, books=1, seed=seed + 1)[0, 0]
    angles = position * 10000.0 ** (-torch.arange(DIM // 2) / (DIM // 2))
    rotation = torch.polar(torch.ones(DIM // 2), angles)
    keys = torch.view_as_complex(quantizer.decode(codes)[:, 0].unflatten(-1, (-1, 2)).contiguous())
    turned_keys = torch.view_as_real(keys * rotation).flatten(-2)
    products = scores(query, codes[:, 0], quantizer.units_[0])
    torch.testing.assert_close(
        (products * rotation).real.sum(-1), turned_keys @ query, atol=1e-3, rtol=1e-3
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000))
def test_at_zero_temperature_an_m_step_never_raises_distortion(seed: int) -> None:
    x = vectors(60, books=2, dim=4, seed=seed)
    weights = torch.rand(60, 2, generator=torch.Generator().manual_seed(seed)).double()
    units = vectors(4, books=2, dim=4, seed=seed + 1).transpose(0, 1)
    codes = nearest(x, units)

    def distortion(units: torch.Tensor) -> torch.Tensor:
        """With the assignment as it is."""
        return ((x - codeword(codes, units)).square().sum(-1) * weights).sum(0)

    moved = m_step(*e_step(x, units, weights, 0.0), units)
    assert bool((distortion(moved) <= distortion(units) * (1 + 1e-5) + 1e-6).all())
    assert hard_error(x, moved, weights) <= hard_error(x, units, weights) * (1 + 1e-5) + 1e-6


def test_the_m_step_finds_units_that_made_the_data() -> None:
    units = vectors(4, books=1, seed=3).transpose(0, 1)
    codes = torch.randint(16, (2000, 1), generator=torch.Generator().manual_seed(0))
    x = codeword(codes, units)
    weights = torch.ones(2000, 1).double()
    found = m_step(*e_step(x, units + 0.01, weights, 0.0), units)
    assert hard_error(x, found, weights) < 1e-6


def test_stages_lower_the_mean_error(fitted: Commutative) -> None:
    errors = [health.inertia[-1] for health in fitted.health_]
    assert errors == sorted(errors, reverse=True)
    assert len(errors) == CommutativeConfig(rate=2, size=8).stages(DIM) == 5


def test_scaling_commutes_with_a_complex_factor(fitted: Commutative) -> None:
    codes = fitted.encode(vectors(seed=4))
    before = fitted.decode(codes)
    other = Commutative(rate=2, size=8)
    other.load_state({"units": turned(fitted.units_)})
    torch.testing.assert_close(other.decode(codes), turned(before))


@pytest.mark.parametrize(
    ("settings_", "dim", "stages"),
    [({"rate": 2}, 128, 21), ({"rate": 1.03125}, 128, 11), ({"rate": 2}, 64, 10)],
)
def test_as_many_stages_as_fit(settings_: dict[str, float], dim: int, stages: int) -> None:
    config = CommutativeConfig(**settings_)  # type: ignore[arg-type]
    assert config.bits() == 12
    assert config.stages(dim) == stages


def test_misuse() -> None:
    with pytest.raises(NotFittedError, match="Commutative has not been fitted"):
        Commutative(rate=2).encode(vectors())
    with pytest.raises(StateError, match="64 units need at least as many samples, given 10"):
        Commutative(rate=2).fit(vectors(10))
    with pytest.raises(SchemeError, match=r"give at least 0\.75"):
        CommutativeConfig(rate=0.5).stages(16)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"rope": "post"},
            r"codes keys before RoPE turns them \(rope: pre\), given post-RoPE keys",
        ),
        ({"grouping": {"type": "contiguous", "dim": 4}}, "needs RoPE pairs side by side"),
    ],
)
def test_schemes_that_cannot_work(keys: dict[str, Any], message: str) -> None:
    data = load_scheme("commvq-2").to_dict()
    with pytest.raises(SchemeError, match=message):
        scheme_from_dict({**data, "keys": {**data["keys"], **keys}})
    values = {**data["values"], "quantizer": data["keys"]["quantizer"]}
    with pytest.raises(SchemeError, match="given values"):
        scheme_from_dict({**data, "values": values})
