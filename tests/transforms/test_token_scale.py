from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from vqkv.errors import StateError
from vqkv.transforms.token_scale import TokenScale

STATS = ("std", "rms", "l2", "minmax")
SCOPES = ("head", "layer")

each = pytest.mark.parametrize("scope", SCOPES)
every = pytest.mark.parametrize("stat", STATS)


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@each
@every
def test_inverse_undoes_forward(stat: str, scope: str) -> None:
    transform = TokenScale(stat=stat, scope=scope)
    x = 5 * states(33, 3, 10) + 2
    z, side = transform.forward(x)
    rows = 3 if scope == "head" else 1
    assert side.shape == (33, rows * (2 if stat == "minmax" else 1))
    assert side.shape[1] == transform.side_count(3, x.shape[2])
    assert side.dtype == torch.float16
    torch.testing.assert_close(transform.inverse(z, side), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("stat", "size"),
    [("std", 1.0), ("rms", 5**0.5), ("l2", 20**0.5)],
)
def test_divides_by_the_size_it_names(stat: str, size: float) -> None:
    x = torch.tensor([[[1.0, 3.0, 1.0, 3.0]]])  # mean 2, std 1
    z, side = TokenScale(stat=stat).forward(x)
    stored = torch.tensor(size).half()
    assert side.item() == stored.item()
    torch.testing.assert_close(z, x / stored.float(), rtol=0, atol=0)


def test_the_scope_says_which_channels_share_a_scale() -> None:
    x = torch.cat([torch.ones(1, 1, 4), torch.full((1, 1, 4), 3.0)], 1)
    assert TokenScale(scope="head").forward(x)[1].tolist() == [[1.0, 3.0]]
    assert TokenScale(scope="layer").forward(x)[1].item() == pytest.approx(5**0.5, rel=1e-3)


@each
@every
@pytest.mark.parametrize("power", [-3, 1, 6])
def test_powers_of_two_scale_through_exactly(stat: str, scope: str, power: int) -> None:
    transform = TokenScale(stat=stat, scope=scope)
    x = states(20, 2, 16)
    z, side = transform.forward(x)
    z_scaled, side_scaled = transform.forward(x * 2.0**power)
    assert torch.equal(z, z_scaled)
    assert torch.equal(side * 2.0**power, side_scaled)
    assert torch.equal(
        transform.inverse(z_scaled, side_scaled), transform.inverse(z, side) * 2.0**power
    )


@pytest.mark.parametrize("scope", SCOPES)
@given(
    st_numpy.arrays(
        "float32", (3, 2, 4), elements=st.floats(-30000, 30000, width=32, allow_subnormal=False)
    )
)
def test_minmax_maps_into_the_unit_interval(scope: str, x: object) -> None:
    transform = TokenScale(stat="minmax", scope=scope)
    given_states = torch.as_tensor(x)
    z, side = transform.forward(given_states)
    assert z.min() >= 0 and z.max() <= 1
    back = transform.inverse(z, side)
    scale = given_states.abs().amax() + 1
    assert (back - given_states).abs().amax() <= 1e-6 * scale


@each
@every
def test_tokens_of_zeros_and_constants_survive(stat: str, scope: str) -> None:
    transform = TokenScale(stat=stat, scope=scope)
    x = torch.zeros(3, 2, 8)
    x[1], x[2] = 0.25, -7.0
    z, side = transform.forward(x)
    assert z.isfinite().all() and side.isfinite().all() and not z[0].any()
    torch.testing.assert_close(transform.inverse(z, side), x, rtol=1e-6, atol=1e-6)


@every
def test_tokens_too_small_for_fp16_keep_their_scale(stat: str) -> None:
    transform = TokenScale(stat=stat)
    x = 1e-7 * states(5, 2, 8)
    z, side = transform.forward(x)
    assert side.isfinite().all() and z.isfinite().all()
    torch.testing.assert_close(transform.inverse(z, side), x, rtol=1e-4, atol=1e-11)


@pytest.mark.parametrize("size", [1e6, 1e30])
@each
@every
def test_tokens_too_large_for_fp16_are_refused(stat: str, scope: str, size: float) -> None:
    x = states(5, 2, 8)
    x[3] *= size
    with pytest.raises(StateError, match=r"a token's scale is .*beyond fp16's 65504"):
        TokenScale(stat=stat, scope=scope).forward(x)


@every
def test_one_channel(stat: str) -> None:
    transform = TokenScale(stat=stat)
    x = states(6, 2, 1)
    z, side = transform.forward(x)
    torch.testing.assert_close(transform.inverse(z, side), x, rtol=1e-5, atol=1e-6)


def test_inverse_needs_the_side() -> None:
    with pytest.raises(StateError, match="needs the side that forward returned"):
        TokenScale().inverse(torch.ones(1, 1, 2), None)
