"""Codes of heads chosen together: compiled kernels against the naive one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vqkv.errors import StateError
from vqkv.kernels.decode import decode
from vqkv.kernels.encode import heads_triton
from vqkv.kernels.encode.heads import encode_heads
from vqkv.kernels.select import KERNELS, recording, using
from vqkv.layouts import Layout


def _runs(name: str) -> bool:
    kernel = KERNELS.get(f"encode_heads.{name}")
    return kernel.refuses(Layout.of_codebook(3, 1, 16, 5, 1), torch.device("cpu")) is None


INTERPRETED = _runs("triton")
COMPILED = [name for name in ("cpu", "triton") if _runs(name)]
#: N, B, h, groups of a head, K, d
SHAPES = [
    (1, 1, 2, 2, 3, 1),
    (70, 2, 3, 4, 33, 4),
    (40, 1, 4, 5, 16, 3),
    (17, 1, 2, 2, 256, 8),
    (0, 1, 2, 2, 3, 1),
]


def case(
    rows: int, sets: int, heads: int, groups: int, size: int, dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Vectors, codewords, and a coupling of heads whose metric is positive definite."""
    generator = torch.Generator().manual_seed(rows + size)
    subvectors, width = sets * heads * groups, groups * dim
    x = torch.randn(rows, subvectors, dim, generator=generator)
    words = torch.randn(subvectors, 1, size, dim, generator=generator)
    noise = torch.randn(sets, heads * width, heads * width, generator=generator)
    coupling = (0.25 * (noise + noise.mT) / (heads * width) ** 0.5).half()
    parts = coupling.view(sets, heads, width, heads, width)
    for head in range(heads):
        parts[:, head, :, head] = 0
    return x, words, parts


def cost(
    x: torch.Tensor, words: torch.Tensor, coupling: torch.Tensor, codes: torch.Tensor
) -> float:
    """Of errors, where those of one head cost their squares."""
    error = (decode(codes, words) - x).view(len(x), *coupling.shape[:3])
    coupled = torch.einsum("nbhi,bhigj,nbgj->", error, coupling.float(), error)
    return float(coupled + error.square().sum())


def by_both(
    given: tuple[torch.Tensor, torch.Tensor, torch.Tensor], sweeps: int, kernel: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes by a compiled kernel, and by the naive one."""
    with using(encode_heads="naive", encode="naive"):
        expected = encode_heads(*given, sweeps=sweeps)
    with using(encode_heads=kernel), recording() as ran:
        found = encode_heads(*given, sweeps=sweeps)
    assert ran == [f"encode_heads.{kernel}"]
    return found, expected


@pytest.mark.parametrize("kernel", COMPILED)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_the_naive_kernel_s_but_for_near_ties(
    shape: tuple[int, ...], scale: float, kernel: str
) -> None:
    x, words, coupling = case(*shape)
    given = (scale * x, scale * words, coupling)
    found, expected = by_both(given, 3, kernel)
    assert found.shape == expected.shape and found.dtype == torch.int32
    # Later codes follow from those of near ties.
    assert (expected != found).sum() <= 1 + 0.02 * found.numel()
    assert cost(*given, found) == pytest.approx(cost(*given, expected), rel=2e-3)


@pytest.mark.parametrize("kernel", COMPILED)
@pytest.mark.parametrize("size, dim", [(192, 8), (48, 24), (40, 10)])
def test_padding_is_no_codeword(size: int, dim: int, kernel: str) -> None:
    """Though it is nearest to short vectors."""
    x, words, coupling = case(40, 1, 2, 2, size, dim)
    given = (0.1 * x, words, coupling)
    found, expected = by_both(given, 2, kernel)
    assert (expected != found).sum() <= 1 + 0.02 * found.numel()


@pytest.mark.parametrize("kernel", COMPILED)
def test_heads_of_unlike_sizes_and_vectors_far_off(kernel: str) -> None:
    """One head's codewords are a thousand times as long, and vectors lie beyond all of them."""
    x, words, coupling = case(33, 1, 3, 2, 40, 4)
    sizes = torch.tensor([1.0, 1e3, 1e-2]).repeat_interleave(2).view(1, -1, 1)
    x, words = 1e2 * sizes * x, sizes.view(-1, 1, 1, 1) * words
    # A coupling in the metric of such sizes, as errors of a long head would push all others away.
    weight = 1 / sizes.view(1, 3, 2).expand(4, -1, -1).permute(1, 2, 0).reshape(3, 8)
    coupling = coupling * weight[None, :, :, None, None] * weight
    given = (x, words, coupling.half())
    found, expected = by_both(given, 2, kernel)
    assert (expected != found).sum() <= 1 + 0.02 * found.numel()


@pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is not asked for")
def test_long_prompts_are_left_to_torch_s_products(monkeypatch: pytest.MonkeyPatch) -> None:
    given = case(70, 1, 2, 2, 16, 2)
    with using(encode_heads="naive", encode="triton"):
        expected = encode_heads(*given, sweeps=2)
    monkeypatch.setattr(heads_triton, "MANY", 70)
    with using(encode_heads="triton", encode="triton"), recording() as ran:
        found = encode_heads(*given, sweeps=2)
    assert torch.equal(found, expected) and ran.count("encode.triton") == 4


@pytest.mark.skipif("cpu" not in COMPILED, reason="the package was built without a C compiler")
@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("shape", [*SHAPES, (300, 2, 3, 3, 20, 3), (130, 1, 2, 3, 17, 7)], ids=str)
def test_every_level_and_thread_chooses_alike(shape: tuple[int, ...]) -> None:
    given = case(*shape)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        found, expected = by_both(given, 2, "cpu")
        torch.set_num_threads(3)
        assert torch.equal(by_both(given, 2, "cpu")[0], found)
    finally:
        torch.set_num_threads(threads)
    assert (expected != found).sum() <= 1 + 0.02 * found.numel()
    assert cost(*given, found) == pytest.approx(cost(*given, expected), rel=2e-3)


def test_another_sweep_costs_no_more() -> None:
    given = case(200, 2, 4, 2, 16, 2)
    costs = [cost(*given, encode_heads(*given, sweeps=sweeps)) for sweeps in (1, 2, 4)]
    assert costs[0] > costs[1] > 0 and costs[2] <= costs[1]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, words, coupling: (x[:, 1:], words, coupling),
        lambda x, words, coupling: (x, words[1:], coupling),
        lambda x, words, coupling: (x, words.expand(-1, 2, -1, -1), coupling),
        lambda x, words, coupling: (x, words, coupling[:, :1]),
        lambda x, words, coupling: (x, words, coupling[0]),
        lambda x, words, coupling: (x, words, coupling[:, :, :, 1:]),
    ],
)
def test_shapes_that_do_not_fit_are_refused(wrong: Any) -> None:
    x, words, coupling = wrong(*case(3, 1, 2, 2, 4, 2))
    with pytest.raises(StateError, match=r"the coupling \[B, h, n, h, n\]"):
        encode_heads(x, words, coupling, sweeps=1)
