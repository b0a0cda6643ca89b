"""Codes chosen together: the compiled kernel against the naive one, both against brute force."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from vqkv.errors import StateError
from vqkv.kernels import native
from vqkv.kernels.decode import decode
from vqkv.kernels.encode.joint import encode_joint
from vqkv.kernels.select import recording, using

KERNELS = [
    "naive",
    pytest.param("cpu", marks=pytest.mark.skipif(not native.available(), reason="no C compiler")),
]


def case(
    rows: int, units: int, groups: int, size: int, dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Vectors, codewords, and a metric whose blocks of one group are unit ones."""
    generator = torch.Generator().manual_seed(rows + size)
    x = torch.randn(rows, units * groups, dim, generator=generator)
    words = torch.randn(units * groups, 1, size, dim, generator=generator)
    channels = groups * dim
    noise = torch.randn(units, channels, channels, generator=generator)
    spread = torch.eye(channels) + 0.1 * (noise + noise.mT)
    own = torch.arange(channels) // dim
    return x, words, torch.where(own[:, None] == own, torch.eye(channels), spread)


def cost(x: torch.Tensor, words: torch.Tensor, metric: torch.Tensor, codes: torch.Tensor) -> float:
    error = (decode(codes, words) - x).view(len(x), len(metric), -1)
    return float(torch.einsum("nui,uij,nuj->", error, metric, error))


@pytest.mark.parametrize("shape", [(1, 1, 2, 3, 1), (131, 3, 4, 33, 4), (300, 2, 5, 16, 3)])
@pytest.mark.skipif(not native.available(), reason="no C compiler")
def test_kernels_agree_but_for_near_ties(shape: tuple[int, ...]) -> None:
    given = case(*shape)
    found = {}
    for kernel in ("naive", "cpu"):
        with using(encode_joint=kernel), recording() as ran:
            found[kernel] = encode_joint(*given, sweeps=3)
        assert ran[0] == f"encode_joint.{kernel}"
    assert (found["naive"] == found["cpu"]).float().mean() > 0.99
    assert cost(*given, found["cpu"]) == pytest.approx(cost(*given, found["naive"]), rel=1e-3)


@pytest.mark.parametrize("kernel", KERNELS)
def test_more_sweeps_cost_no_more(kernel: str) -> None:
    given = case(200, 2, 4, 16, 2)
    with using(encode_joint=kernel):
        costs = [cost(*given, encode_joint(*given, sweeps=sweeps)) for sweeps in (1, 2, 4)]
    assert costs[0] > costs[1] > 0 and costs[2] <= costs[1]


@pytest.mark.parametrize("kernel", KERNELS)
def test_of_two_groups_the_second_is_best_given_the_first(kernel: str) -> None:
    x, words, metric = case(1, 1, 2, 4, 2)
    with using(encode_joint=kernel):
        codes = encode_joint(x, words, metric, sweeps=1)
    tried = {
        pair: cost(x, words, metric, torch.tensor(pair, dtype=torch.int32).view(1, 2, 1))
        for pair in product(range(4), repeat=2)
    }
    first, second = codes.flatten().tolist()
    assert tried[first, second] == min(tried[first, k] for k in range(4))


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, words, metric = case(3, 1, 2, 4, 2)
    with pytest.raises(StateError, match=r"metric \[U, n, n\] with n = M d / U"):
        encode_joint(x, words, metric[:, 1:], sweeps=1)
