"""Beam search by the compiled kernel."""

from __future__ import annotations

import math

import torch

from vqkv.kernels.native.library import in_ranges, level_number, library, padded

#: Rows below which another thread costs more than it gives.
MIN_ROWS = 16


def encode_beam(x: torch.Tensor, codewords: torch.Tensor, width: int) -> torch.Tensor:
    """Codes `[N, M, S]` (int32), all on the CPU and in fp32."""
    x, codewords = x.contiguous(), codewords.contiguous()
    books, stages, size, dim = codewords.shape
    words = padded(-2 * codewords.mT, 0)  # [M, S, d, room]
    norms = padded(codewords.square().sum(-1), math.inf)  # [M, S, room]
    codes = torch.empty(len(x), books, stages, dtype=torch.int32, device="cpu")

    def run(begin: int, end: int) -> int:
        failure: int = library().vqkv_beam(
            level_number(),
            *(x.data_ptr(), codewords.data_ptr(), words.data_ptr(), norms.data_ptr()),
            *(books, stages, size, norms.shape[2], dim, width, begin, end),
            codes.data_ptr(),
        )
        return failure

    if any(in_ranges(len(x), MIN_ROWS, run)):
        raise MemoryError("no memory for the sums of a block of vectors")
    return codes
