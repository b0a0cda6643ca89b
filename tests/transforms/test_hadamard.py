from __future__ import annotations

from typing import Any

import pytest
import torch

from vqkv.errors import SchemeError
from vqkv.transforms.hadamard import Hadamard, _rotation

CPU = torch.device("cpu")
SIZES = [*range(1, 33), 48, 80, 96, 128]


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sign_seed", [None, 0, 7])
@pytest.mark.parametrize("size", SIZES)
def test_orthogonal_at_every_size(size: int, sign_seed: int | None) -> None:
    matrix = _rotation(size, sign_seed, CPU).double()
    torch.testing.assert_close(
        matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("size", [1, 2, 4, 16, 64, 128])
def test_powers_of_two_are_hadamard(size: int) -> None:
    matrix = _rotation(size, 3, CPU)
    torch.testing.assert_close(matrix.abs(), torch.full((size, size), size**-0.5))


@pytest.mark.parametrize("size", [8, 12, 80, 96])
def test_a_constant_goes_to_one_channel(size: int) -> None:
    # Without signs the first row is constant, in Sylvester's matrix and in the cosine one.
    z, _ = Hadamard(sign_seed=None).forward(torch.ones(1, 1, size))
    expected = torch.zeros(1, 1, size)
    expected[..., 0] = size**0.5
    torch.testing.assert_close(z, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [64, 80, 96, 128])
def test_an_outlier_is_spread(size: int) -> None:
    x = torch.zeros(1, 1, size)
    x[..., 3] = 100.0
    z, _ = Hadamard().forward(x)
    assert z.abs().max() <= 100 * (2 / size) ** 0.5 * 2**0.5 + 1e-3
    assert z.norm() == pytest.approx(100.0, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "heads", "head_dim"),
    [
        ({}, 3, 64),
        ({"scope": "layer"}, 3, 80),
        ({"block": 16}, 2, 96),
        ({"scope": "layer", "block": 40}, 2, 80),
        ({"sign_seed": None}, 1, 1),
    ],
)
def test_rotating_back(settings: dict[str, Any], heads: int, head_dim: int) -> None:
    transform = Hadamard(**settings)
    x = states(17, heads, head_dim)
    z, side = transform.forward(x)
    assert side is None and z.shape == x.shape
    torch.testing.assert_close(transform.inverse(z, None), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(z.square().sum((1, 2)), x.square().sum((1, 2)))


def test_scope_and_block_say_which_channels_mix() -> None:
    x = torch.zeros(1, 2, 8)
    x[0, 0, 1] = 1.0
    assert Hadamard().head_local and not Hadamard(scope="layer").head_local
    per_head, _ = Hadamard().forward(x)
    assert (per_head[0, 1] == 0).all() and (per_head[0, 0] != 0).all()
    assert (Hadamard(scope="layer").forward(x)[0] != 0).all()
    blocks, _ = Hadamard(block=4).forward(x)
    assert (blocks[0, 0, :4] != 0).all() and (blocks[0, 0, 4:] == 0).all()


def test_signs_follow_from_the_seed() -> None:
    x = states(4, 1, 32)
    assert torch.equal(Hadamard(sign_seed=5).forward(x)[0], Hadamard(sign_seed=5).forward(x)[0])
    assert not torch.equal(Hadamard(sign_seed=5).forward(x)[0], Hadamard(sign_seed=6).forward(x)[0])


def test_a_block_that_does_not_divide_is_refused() -> None:
    with pytest.raises(
        SchemeError, match=r"hadamard\.block: 24 does not divide the 64 channels of a head"
    ):
        Hadamard(block=24).check(3, 64)
    Hadamard(block=24, scope="layer").check(3, 64)
    with pytest.raises(SchemeError, match="does not divide"):
        Hadamard(block=24).forward(torch.ones(1, 3, 64))
