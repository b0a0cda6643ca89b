"""Bit-packing by the compiled kernel."""

from __future__ import annotations

import torch

from vqkv.kernels.native.library import in_ranges, library

#: Rows below which another thread costs more than it gives.
MIN_ROWS = 1024


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes `[..., n]`, each below `2**bits`, to bytes `[..., ceil(n · bits / 8)]`."""
    if bits == 8:
        return codes.to(torch.uint8)
    count = codes.shape[-1]
    size = -(-count * bits // 8)
    rows = codes.reshape(-1, count).int().contiguous() if codes.numel() else codes.new_empty(0, 0)
    packed = torch.empty(*codes.shape[:-1], size, dtype=torch.uint8, device="cpu")

    def run(begin: int, end: int) -> None:
        library().vqkv_pack(rows.data_ptr(), count, bits, begin, end, packed.data_ptr())

    if packed.numel():
        in_ranges(len(rows), MIN_ROWS, run)
    return packed


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Bytes `[..., ceil(n · bits / 8)]` to codes `[..., n]` (int32), n being `count`."""
    if bits == 8:
        return packed.to(torch.int32)
    codes = torch.empty(*packed.shape[:-1], count, dtype=torch.int32, device="cpu")
    if not packed.numel():
        return codes.zero_()
    rows = packed.reshape(-1, packed.shape[-1])  # a view where bytes of others lie between
    if rows.stride(1) != 1:
        rows = rows.contiguous()

    def run(begin: int, end: int) -> None:
        library().vqkv_unpack(
            *(rows.data_ptr(), rows.stride(0), count, bits, begin, end, codes.data_ptr())
        )

    in_ranges(len(rows), MIN_ROWS, run)
    return codes
