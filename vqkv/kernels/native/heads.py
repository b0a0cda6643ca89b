"""Codes of heads chosen together by the compiled kernel."""

from __future__ import annotations

import torch

from vqkv.kernels.native.library import in_ranges, level_number, library

#: Rows below which another thread costs more than it gives.
MIN_ROWS = 64


def encode_heads(
    x: torch.Tensor, codewords: torch.Tensor, coupling: torch.Tensor, sweeps: int
) -> torch.Tensor:
    """Codes `[N, M, 1]` (int32), all on the CPU."""
    x, words, pushed = (each.float().contiguous() for each in (x, codewords[:, 0], coupling))
    books, size, dim = words.shape
    sets, heads = coupling.shape[:2]
    codes = torch.empty(*x.shape[:2], 1, dtype=torch.int32, device="cpu")

    def run(begin: int, end: int) -> int:
        failure: int = library().vqkv_heads(
            level_number(),
            *(x.data_ptr(), words.data_ptr(), pushed.data_ptr()),
            *(sets, heads, books // (sets * heads), size, dim, sweeps, begin, end),
            codes.data_ptr(),
        )
        return failure

    if any(in_ranges(len(x), MIN_ROWS, run)):
        raise MemoryError("no memory for a block of vectors")
    return codes
