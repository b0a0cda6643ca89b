"""Codes chosen together by the compiled kernel."""

from __future__ import annotations

import torch

from vqkv.kernels.encode.joint import Coupling
from vqkv.kernels.native.library import in_ranges, level_number, library

#: Rows below which another thread costs more than it gives.
MIN_ROWS = 64


def encode_joint(
    x: torch.Tensor, codewords: torch.Tensor, coupled: Coupling, sweeps: int, width: int
) -> torch.Tensor:
    """Codes `[N, M, 1]` (int32), all on the CPU."""
    given = (x, codewords[:, 0], *coupled)
    x, words, metric, ahead = (tensor.float().contiguous() for tensor in given)
    books, size, dim = words.shape
    units = len(metric)
    codes = torch.empty(*x.shape[:2], 1, dtype=torch.int32, device="cpu")

    def run(begin: int, end: int) -> int:
        failure: int = library().vqkv_joint(
            level_number(),
            *(x.data_ptr(), words.data_ptr(), metric.data_ptr(), ahead.data_ptr()),
            *(units, books // units, size, dim, width, sweeps, begin, end),
            codes.data_ptr(),
        )
        return failure

    if any(in_ranges(len(x), MIN_ROWS, run)):
        raise MemoryError("no memory for a block of vectors")
    return codes
