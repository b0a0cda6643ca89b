"""The nearest sum of two codewords: the compiled kernel and the naive one against all sums."""

from __future__ import annotations

import pytest
import torch

from vqkv.errors import StateError
from vqkv.kernels import native
from vqkv.kernels.encode.sums import encode_sums
from vqkv.kernels.select import recording, using

needs_compiler = pytest.mark.skipif(not native.available(), reason="no C compiler")


def case(rows: int, books: int, size: int, dim: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + size)
    shapes = [(rows, books, dim), (books, size, dim), (books, size, dim)]
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def nearest(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    sums = (first.unsqueeze(2) + second.unsqueeze(1)).flatten(1, 2)  # [M, K², d]
    return torch.cdist(x.transpose(0, 1).double(), sums.double()).argmin(-1).t().int()


SHAPES = [(1, 1, 1, 1), (70, 3, 19, 5), (131, 2, 16, 4), (5, 2, 64, 8)]


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES)
def test_the_compiled_kernel_finds_the_nearest(shape: tuple[int, ...], level: native.Level) -> None:
    given = case(*shape)
    with using(encode_sums="cpu"), recording() as ran:
        codes = encode_sums(*given)
    assert ran == ["encode_sums.cpu"]
    assert torch.equal(codes, nearest(*given))


@pytest.mark.parametrize("shape", SHAPES)
def test_so_does_the_naive_one(shape: tuple[int, ...]) -> None:
    given = case(*shape)
    with using(encode_sums="naive"):
        assert torch.equal(encode_sums(*given), nearest(*given))


@pytest.mark.parametrize("kernel", ["naive", pytest.param("cpu", marks=needs_compiler)])
def test_the_lowest_wins_among_equals_and_no_vectors_have_no_codes(kernel: str) -> None:
    x, words = torch.zeros(3, 1, 2), torch.ones(1, 20, 2)
    with using(encode_sums=kernel):
        assert encode_sums(x, words, words).tolist() == [[0]] * 3
        assert encode_sums(x[:0], words, words).shape == (0, 1)


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, first, second = case(3, 2, 4, 2)
    with pytest.raises(StateError, match=r"given \[3, 2, 2\], \[2, 4, 2\] and \[2, 3, 2\]"):
        encode_sums(x, first, second[:, 1:])
