"""Beam search: the compiled kernel against the naive one, both against all sums."""

from __future__ import annotations

import pytest
import torch

from vqkv.errors import StateError
from vqkv.kernels import native
from vqkv.kernels.decode import decode
from vqkv.kernels.encode.beam import encode_beam
from vqkv.kernels.select import recording, select, using
from vqkv.layouts import Layout

needs_compiler = pytest.mark.skipif(not native.available(), reason="no C compiler")
KERNELS = ["naive", pytest.param("cpu", marks=needs_compiler)]


def case(
    rows: int, books: int, stages: int, size: int, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + size)
    x = torch.randn(rows, books, dim, generator=generator)
    return x, torch.randn(books, stages, size, dim, generator=generator) / stages**0.5


def errors(x: torch.Tensor, words: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return (x - decode(codes, words)).square().sum(-1)


@needs_compiler
@pytest.mark.parametrize("width", [1, 3, 8, 40])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1), (131, 3, 4, 33, 5), (65, 2, 7, 16, 8), (70, 1, 3, 100, 4)]
)
def test_kernels_agree_but_for_near_ties(
    shape: tuple[int, ...], width: int, level: native.Level
) -> None:
    x, words = case(*shape)
    found = {}
    for kernel in ("naive", "cpu"):
        with using(encode_beam=kernel), recording() as ran:
            found[kernel] = encode_beam(x, words, width)
        assert ran == [f"encode_beam.{kernel}"]
    same = (found["naive"] == found["cpu"]).all(-1)
    assert same.float().mean() > 0.98
    naive, compiled = (errors(x, words, codes) for codes in found.values())
    torch.testing.assert_close(compiled.mean(), naive.mean(), rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(compiled[same], naive[same])


@pytest.mark.parametrize("kernel", KERNELS)
def test_two_stages_as_wide_as_a_codebook_give_the_nearest_sum(kernel: str) -> None:
    x, words = case(60, 2, 2, 19, 6)
    every = torch.cartesian_prod(*[torch.arange(19)] * 2)  # [361, 2]
    sums = decode(every.unsqueeze(1).expand(-1, 2, -1).contiguous().int(), words)  # [361, M, d]
    best = torch.cdist(x.transpose(0, 1), sums.transpose(0, 1)).amin(-1).t().square()
    with using(encode_beam=kernel):
        codes = encode_beam(x, words, 19)
    torch.testing.assert_close(errors(x, words, codes), best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_vectors_have_no_codes(kernel: str) -> None:
    x, words = case(0, 2, 3, 4, 5)
    with using(encode_beam=kernel):
        assert encode_beam(x, words, 2).shape == (0, 2, 3)


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, words = case(3, 2, 2, 4, 2)
    with pytest.raises(StateError, match=r"shape \[N, 2, 2\], given \[3, 1, 2\]"):
        encode_beam(x[:, 1:], words, 2)


@needs_compiler
def test_too_many_products_are_left_to_the_naive_kernel() -> None:
    selection = select("encode_beam", Layout.of_codebook(1, 2, 8192, 8), "cpu")
    assert selection.kernel.name == "naive"
    assert "2 stages of 8192 codewords" in selection.refused["encode_beam.cpu"]
