"""The best path through a trellis: kernels against each other, and against all paths."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from vqkv.errors import KernelError, StateError
from vqkv.kernels import native
from vqkv.kernels.encode.trellis import encode_trellis
from vqkv.kernels.native.library import forced_level
from vqkv.kernels.select import recording, using

needs_c = pytest.mark.skipif(not native.available(), reason="no C compiler")
KERNELS = ["naive", pytest.param("cpu", marks=needs_c)]


def case(
    rows: int, widths: list[int], memory: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + memory)
    pairs = len(widths)
    x = torch.randn(rows, pairs, 2, generator=generator)
    cost = torch.rand(pairs, 2, generator=generator) + 0.1
    table = torch.randn(1 << memory, 2, generator=generator)
    return x, cost, table, torch.tensor(widths)


def states(codes: torch.Tensor, widths: torch.Tensor, memory: int) -> torch.Tensor:
    state, found = torch.zeros(len(codes), dtype=torch.int64), []
    for pair, width in enumerate(widths.tolist()):
        state = ((state << width) | codes[:, pair].long()) % (1 << memory)
        found.append(state)
    return torch.stack(found, 1)


def costs(
    codes: torch.Tensor, x: torch.Tensor, cost: torch.Tensor, table: torch.Tensor,
    widths: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    memory = len(table).bit_length() - 1
    decoded = table[states(codes, widths, memory)]
    return ((x - decoded).square() * cost).sum((1, 2))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("widths", [[2, 1, 3], [4, 4], [1] * 6, [3]])
def test_no_path_costs_less(kernel: str, widths: list[int]) -> None:
    given = case(5, widths, memory=4)
    with using(encode_trellis=kernel), recording() as ran:
        found = costs(encode_trellis(*given), *given)
    assert ran == [f"encode_trellis.{kernel}"]
    every = torch.tensor(list(product(*(range(1 << width) for width in widths))))
    for row in range(5):
        mine = (given[0][row : row + 1].expand(len(every), -1, -1), *given[1:])
        assert found[row] == pytest.approx(float(costs(every, *mine).min()), rel=1e-4)


@needs_c
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_levels_agree_with_the_naive_kernel(level: str, rows: int) -> None:
    given = case(rows, [6, 5, 4, 4, 3, 2, 2, 1, 1], memory=8)
    with using(encode_trellis="naive"):
        expected = costs(encode_trellis(*given), *given)
    try:
        with forced_level(level), using(encode_trellis="cpu"):  # type: ignore[arg-type]
            found = costs(encode_trellis(*given), *given)
    except KernelError as error:  # a level that this CPU does not have
        pytest.skip(str(error))
    assert torch.allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_vectors_have_no_codes(kernel: str) -> None:
    with using(encode_trellis=kernel):
        assert encode_trellis(*case(0, [2, 2], memory=4)).shape == (0, 2)


def test_vectors_of_no_pairs_have_no_bits() -> None:
    empty = torch.zeros(3, 0, 2), torch.zeros(0, 2), torch.zeros(16, 2), torch.zeros(0).int()
    assert encode_trellis(*empty).shape == (3, 0)


def test_shapes_and_widths_that_do_not_fit_are_refused() -> None:
    x, cost, table, widths = case(3, [2, 2], memory=4)
    for changed in (
        (x[:, :1], cost, table, widths),
        (x, cost[:, :1], table, widths),
        (x, cost, table[:-1], widths),
    ):
        with pytest.raises(StateError, match="x is"):
            encode_trellis(*changed)
    for bad in (0, 5):
        with pytest.raises(StateError, match="from 1 to 4 bits"):
            encode_trellis(x, cost, table, torch.tensor([2, bad]))
