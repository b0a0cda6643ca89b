"""The nearest sum of two codewords by the compiled kernel."""

from __future__ import annotations

import math

import torch

from vqkv.kernels.native.library import in_ranges, level_number, library, padded

#: Rows below which another thread costs more than it gives.
MIN_ROWS = 64


def encode_sums(first: torch.Tensor, second: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Codes `[N, M]` (int32), all on the CPU and in fp32."""
    first, second, sizes = first.contiguous(), padded(second, 0), padded(sizes, math.inf)
    books, size, room = sizes.shape
    codes = torch.empty(first.shape[:2], dtype=torch.int32, device="cpu")

    def run(begin: int, end: int) -> None:
        library().vqkv_sums(
            level_number(),
            *(first.data_ptr(), second.data_ptr(), sizes.data_ptr()),
            *(books, size, room, begin, end),
            codes.data_ptr(),
        )

    in_ranges(len(first), MIN_ROWS, run)
    return codes
