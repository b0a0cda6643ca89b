"""Nearest codewords, and what k-means needs of an assignment."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vqkv.errors import StateError
from vqkv.kernels.native.library import in_ranges, level_number, library

#: Rows below which another thread costs more than it gives.
MIN_ROWS = 256


class Statistics(NamedTuple):
    """What one assignment step of k-means finds: codes `[N, M]`, and in fp64 the rest."""

    codes: torch.Tensor
    sums: torch.Tensor  # [M, K, d]
    counts: torch.Tensor  # [M, K]
    inertia: torch.Tensor  # [M]


def nearest(x: torch.Tensor, codewords: torch.Tensor) -> torch.Tensor:
    """Codes `[N, M]` (int32): the nearest of `codewords` `[M, K, d]` to each of `x` `[N, M, d]`.

    The lowest code wins among equals. Both are fp32 on the CPU.

    Raises:
        StateError: wrong type, device or shape.
    """
    x, codewords = _prepared(x, codewords)
    codes = torch.empty(x.shape[:2], dtype=torch.int32, device="cpu")
    in_ranges(
        x.shape[0],
        MIN_ROWS,
        lambda begin, end: _search(x, codewords, codes, begin, end),
    )
    return codes


def assign_accumulate(
    x: torch.Tensor, codewords: torch.Tensor, weights: torch.Tensor | None = None
) -> Statistics:
    """One assignment step of k-means: nearest codewords, and what the update needs of them.

    Args:
        x: `[N, M, d]`.
        codewords: `[M, K, d]`.
        weights: `[N]` or `[N, M]`; ones where left out.

    Raises:
        StateError: wrong type, device or shape.
    """
    x, codewords = _prepared(x, codewords)
    if weights is not None:
        if weights.ndim == 1:
            weights = weights.unsqueeze(1)
        weights = weights.float().expand(x.shape[:2]).contiguous()
    codes = torch.empty(x.shape[:2], dtype=torch.int32, device="cpu")
    books = codewords.shape

    def step(begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        _search(x, codewords, codes, begin, end)
        sums = torch.zeros(books, dtype=torch.float64, device="cpu")
        counts = torch.zeros(books[:2], dtype=torch.float64, device="cpu")
        inertia = torch.zeros(books[0], dtype=torch.float64, device="cpu")
        library().vqkv_accumulate(
            *(x.data_ptr(), codewords.data_ptr(), codes.data_ptr()),
            None if weights is None else weights.data_ptr(),
            *(*books, begin, end),
            *(sums.data_ptr(), counts.data_ptr(), inertia.data_ptr()),
        )
        return sums, counts, inertia

    parts = in_ranges(x.shape[0], MIN_ROWS, step)
    if not parts:
        parts = [step(0, 0)]
    totals = [torch.stack(column).sum(0) for column in zip(*parts, strict=True)]
    return Statistics(codes, *totals)


def _search(
    x: torch.Tensor,
    codewords: torch.Tensor,
    codes: torch.Tensor,
    begin: int,
    end: int,
) -> None:
    failed = library().vqkv_nearest(
        level_number(),
        *(x.data_ptr(), codewords.data_ptr()),
        *(*codewords.shape, begin, end),
        codes.data_ptr(),
    )
    if failed:
        raise MemoryError("no memory for a block of vectors")


def _prepared(x: torch.Tensor, codewords: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    for name, tensor in (("x", x), ("codewords", codewords)):
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise StateError(
                f"{name} is float32 on the cpu, given {tensor.dtype} on {tensor.device}"
            )
    if (
        x.ndim != 3
        or codewords.ndim != 3
        or (x.shape[1], x.shape[2]) != (codewords.shape[0], codewords.shape[2])
        or not codewords.shape[1]
    ):
        raise StateError(
            f"x [N, M, d] and codewords [M, K, d] agree in M and d, and K is positive; given "
            f"{list(x.shape)} and {list(codewords.shape)}"
        )
    return x.contiguous(), codewords.contiguous()
