"""The best path through a trellis by the compiled kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vqkv.kernels.native.library import in_ranges, level_number, library

#: Rows below which another thread costs more than it gives.
MIN_ROWS = 32


def encode_trellis(
    x: torch.Tensor, cost: torch.Tensor, table: torch.Tensor, widths: Sequence[int]
) -> torch.Tensor:
    """Bits `[N, n]` (int32), all on the CPU."""
    x, cost, table = (tensor.float().contiguous() for tensor in (x, cost, table))
    steps = torch.tensor(widths, dtype=torch.int32)
    memory = len(table).bit_length() - 1
    codes = torch.empty(len(x), len(widths), dtype=torch.int32)

    def run(begin: int, end: int) -> int:
        failure: int = library().vqkv_trellis(
            level_number(),
            *(x.data_ptr(), cost.data_ptr(), table.data_ptr(), steps.data_ptr()),
            *(len(widths), memory, begin, end),
            codes.data_ptr(),
        )
        return failure

    if any(in_ranges(len(x), MIN_ROWS, run)):
        raise MemoryError("no memory for the paths of a block of vectors")
    return codes
