"""Paths through a trellis, and what they lead to, by the compiled kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vqkv.errors import StateError
from vqkv.kernels.decode.trellis import Strings
from vqkv.kernels.native.library import in_ranges, level_number, library

#: Rows below which another thread costs more than it gives.
MIN_ROWS, MIN_DECODED = 32, 256


def encode_trellis(
    x: torch.Tensor, cost: torch.Tensor, table: torch.Tensor, widths: Sequence[int]
) -> torch.Tensor:
    """Bits `[N, n]` (int32), all on the CPU."""
    x, cost, table = (tensor.float().contiguous() for tensor in (x, cost, table))
    steps = torch.tensor(widths, dtype=torch.int32, device="cpu")
    memory = len(table).bit_length() - 1
    codes = torch.empty(len(x), len(widths), dtype=torch.int32, device="cpu")

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


def decode_trellis(strings: Strings, units: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Pairs `[N, P, 2]` (fp32), all on the CPU.

    Raises:
        StateError: a token has bytes outside of the codes, or more than there are widths for.
    """
    codes = strings.codes.int().contiguous()
    offsets, counts, ends = (t.long().contiguous() for t in strings[1:])
    units, table = units.float().contiguous(), table.float().contiguous()
    tokens, (sizes, pairs) = len(offsets), ends.shape
    found = torch.empty(tokens, pairs, 2, dtype=torch.float32, device=codes.device)

    def run(begin: int, end: int) -> int:
        failure: int = library().vqkv_trellis_decode(
            *(codes.data_ptr(), len(codes), offsets.data_ptr(), counts.data_ptr()),
            *(ends.data_ptr(), units.data_ptr(), table.data_ptr()),
            *(sizes, pairs, len(table).bit_length() - 1, begin, end),
            found.data_ptr(),
        )
        return failure

    if any(in_ranges(tokens, MIN_DECODED, run)):
        raise StateError("a token's bytes lie outside of the codes, or are too many")
    return found
