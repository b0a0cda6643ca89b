"""Lengths and angles."""

from __future__ import annotations

import math

import pytest
import torch

from vqkv.codec import Codec
from vqkv.errors import SchemeError
from vqkv.rotation import rope_pairs
from vqkv.scheme import StreamConfig
from vqkv.scheme_files import load_scheme
from vqkv.transforms.polar import Polar


def tokens(head_dim: int = 8) -> torch.Tensor:
    return torch.randn(64, 2, head_dim, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("pairing", "index"), [("half", 4), ("interleaved", 1)])
def test_rotating_a_pair_moves_its_angle_alone(pairing: str, index: int) -> None:
    polar = Polar().for_pairs(rope_pairs(pairing, 8))  # type: ignore[arg-type]
    x = tokens()
    turned = x.clone()
    c, s = math.cos(0.3), math.sin(0.3)
    turned[..., 0], turned[..., index] = (
        c * x[..., 0] - s * x[..., index],
        s * x[..., 0] + c * x[..., index],
    )
    before, after = (polar.forward(given)[0] for given in (x, turned))
    moved = (after[..., index] - before[..., index]) % (2 * math.pi)
    torch.testing.assert_close(moved, torch.full_like(moved, 0.3), rtol=1e-4, atol=1e-4)
    others = [channel for channel in range(8) if channel != index]
    torch.testing.assert_close(after[..., others], before[..., others], rtol=1e-5, atol=1e-5)


def test_channels_that_do_not_rotate_stay() -> None:
    polar = Polar().for_pairs(((0, 2), (1, 3)))
    z, _ = polar.forward(tokens())
    assert torch.equal(z[..., 4:], tokens()[..., 4:])
    assert bool((z[..., :2] >= 0).all())


def test_a_codec_tells_it_the_pairs_of_keys() -> None:
    keys = load_scheme("polarquant-4").keys
    pairs = rope_pairs("interleaved", 8)
    (polar, _) = Codec(keys, 8, 8, pairs).transforms
    assert isinstance(polar, Polar) and polar.pairs == pairs
    # Without RoPE halves are paired.
    values = StreamConfig.model_validate({**keys.model_dump(exclude={"rope"})})
    codec = Codec(values, 8, 8)
    x = torch.randn(64, 8, 8, generator=torch.Generator().manual_seed(0))
    assert (codec.decode(codec.encode(x)) - x).square().mean() < 0.02


def test_an_odd_channel_has_no_partner() -> None:
    with pytest.raises(SchemeError, match="takes channels in pairs, given head dim 7"):
        Polar().check(2, 7)
