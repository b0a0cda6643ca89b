"""Beam search: the compiled kernel against the naive one, both against all sums."""

from __future__ import annotations

import pytest
import torch

from vqkv.errors import StateError
from vqkv.kernels import native
from vqkv.kernels.decode import decode
from vqkv.kernels.encode.beam import encode_beam
from vqkv.kernels.select import recording, using
from vqkv.quantizers.residual import ResidualQuantizer

needs_compiler = pytest.mark.skipif(not native.available(), reason="no C compiler")
KERNELS = ["naive", pytest.param("cpu", marks=needs_compiler)]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


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
    "shape",
    [(1, 1, 1, 1, 1), (131, 3, 4, 33, 5), (65, 2, 7, 16, 8), (70, 1, 3, 100, 4), (40, 1, 3, 5, 35)],
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
    assert (found["naive"] == found["cpu"]).all(-1).float().mean() > 0.98
    naive, compiled = (errors(x, words, codes) for codes in found.values())
    torch.testing.assert_close(compiled.mean(), naive.mean(), rtol=1e-2, atol=1e-5)


def test_as_many_sums_as_there_are_find_the_nearest(kernel: str) -> None:
    x, words = case(60, 2, 3, 5, 6)
    every = torch.cartesian_prod(*[torch.arange(5)] * 3).int()
    sums = decode(every.unsqueeze(1).expand(-1, 2, -1).contiguous(), words)  # [125, M, d]
    best = torch.cdist(x.transpose(0, 1), sums.transpose(0, 1)).amin(-1).t().square()
    with using(encode_beam=kernel):
        codes = encode_beam(x, words, 25)
    torch.testing.assert_close(errors(x, words, codes), best, rtol=1e-4, atol=1e-5)


def test_half_precision_and_strides_change_nothing(kernel: str) -> None:
    x, words = case(40, 2, 3, 7, 6)
    x, words = x.half().float(), words.half()
    strided = torch.stack([x, x], -1)[..., 0]
    with using(encode_beam=kernel):
        expected = encode_beam(x, words.float(), 4)
        assert torch.equal(encode_beam(strided.half(), words, 4), expected)


def test_a_quantizer_has_codewords_of_half_precision(kernel: str) -> None:
    x, _ = case(100, 2, 1, 1, 4)
    quantizer = ResidualQuantizer(depth=2, code_bits=2, beam=4)
    quantizer.fit(x)
    with using(encode_beam=kernel):
        assert quantizer.encode(x).shape == (100, 2, 2)


@pytest.mark.parametrize("size", [5, 16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_codes_of_what_has_no_distance_are_codes_all_the_same(
    kernel: str, value: float, size: int
) -> None:
    x, words = case(20, 2, 3, size, 4)
    x[3] = value
    with using(encode_beam=kernel):
        codes = encode_beam(x, words * 100, 4)
        alone = encode_beam(x[4:], words * 100, 4)
    assert int(codes.min()) >= 0 and int(codes.max()) < size
    assert torch.equal(codes[4:], alone)


@needs_compiler
def test_threads_share_the_work() -> None:
    x, words = case(301, 2, 3, 9, 4)
    threads = torch.get_num_threads()
    with using(encode_beam="cpu"):
        torch.set_num_threads(1)
        one = encode_beam(x, words, 4)
        torch.set_num_threads(3)
        three = encode_beam(x, words, 4)
    torch.set_num_threads(threads)
    assert torch.equal(one, three)


def test_no_vectors_have_no_codes(kernel: str) -> None:
    x, words = case(0, 2, 3, 4, 5)
    with using(encode_beam=kernel):
        assert encode_beam(x, words, 2).shape == (0, 2, 3)


def test_shapes_that_do_not_fit_and_no_width_are_refused() -> None:
    x, words = case(3, 2, 2, 4, 2)
    with pytest.raises(StateError, match=r"shape \[N, 2, 2\], given \[3, 1, 2\]"):
        encode_beam(x[:, 1:], words, 2)
    with pytest.raises(StateError, match="at least 1 wide, given 0"):
        encode_beam(x, words, 0)
