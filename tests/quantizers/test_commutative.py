"""Codewords that commute with RoPE."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_models import tiny_model
from vqkv.cache.rope import RotaryAdapter
from vqkv.codebooks.commuting import addends, codeword, turned
from vqkv.errors import NotFittedError, SchemeError, StateError
from vqkv.kernels.attend.commuting import as_complex
from vqkv.kernels.decode import decode
from vqkv.kernels.encode import encode
from vqkv.quantizers.commutative import Commutative, CommutativeConfig
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


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**20), st.integers(0, 100))
def test_rotating_then_decoding_is_decoding_then_rotating(position: int, seed: int) -> None:
    """Units turned by any position's angles decode to turned vectors."""
    angles = position * 10000.0 ** (-torch.arange(DIM // 2, dtype=torch.float64) / (DIM // 2))
    turn = torch.polar(torch.ones(DIM // 2, dtype=torch.float64), angles).to(torch.complex64)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(as_complex(x) * turn).flatten(-2)

    first, second = Commutative(rate=2, size=8), Commutative(rate=2, size=8)
    units = torch.randn(2, 5, 8, DIM, generator=torch.Generator().manual_seed(seed))
    first.units_, second.units_ = units, rotated(units)
    codes = torch.randint(64, (30, 2, 5), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        second.decode(codes), rotated(first.decode(codes)), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("family", ["llama", "glm"])
def test_codewords_commute_with_a_model_s_own_rotation(family: str) -> None:
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


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000))
def test_a_beam_is_never_worse_than_greedy_indices(seed: int) -> None:
    """Index by index, that is; stage by stage, a greedy code may be better for a vector."""
    x = vectors(60, seed=seed)
    one, four = (Commutative(rate=2, size=8, beam=beam) for beam in (2, 8))
    one.units_ = four.units_ = vectors(40, seed=seed).view(5, 8, 2, DIM).permute(2, 0, 1, 3)
    words = addends(one.units_)
    greedy = (x - decode(encode(x, words), words)).square().sum(-1)
    for quantizer in (one, four):
        errors = (x - quantizer.decode(quantizer.encode(x))).square().sum(-1)
        assert bool((errors <= greedy * (1 + 1e-5) + 1e-6).all())


def test_a_beam_finds_better_codes_in_the_mean(fitted: Commutative) -> None:
    x = vectors(seed=6)
    wide = Commutative(rate=2, size=8, beam=16)
    wide.load_state(fitted.state())
    greedy, found = ((x - q.decode(q.encode(x))).square().sum() for q in (fitted, wide))
    assert found < 0.97 * greedy


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
