"""Codes to bytes and back: any width from 0 to 16 bits, least significant bit first."""

from __future__ import annotations

import torch

from vqkv.errors import StateError
from vqkv.kernels.select import select
from vqkv.layouts import Layout

MAX_BITS = 16


def pack(codes: torch.Tensor, bits: int, layout: Layout) -> torch.Tensor:
    """Codes `[..., n]` as bytes `[..., ceil(n · bits / 8)]` (uint8).

    Raises:
        StateError: bits outside 0..16, or a code that does not fit into them.
    """
    _check_bits(bits)
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >> bits):
        raise StateError(
            f"codes to pack run from {int(codes.min())} to {int(codes.max())}; "
            f"{bits} bits hold 0 to {2**bits - 1}"
        )
    packed: torch.Tensor = select("pack", layout, codes.device).kernel(codes, bits)
    return packed


def unpack(packed: torch.Tensor, bits: int, count: int, layout: Layout) -> torch.Tensor:
    """Bytes `[..., ceil(n · bits / 8)]` as codes `[..., n]` (int32), n being `count`.

    Raises:
        StateError: bits outside 0..16, or another number of bytes than `count` codes take.
    """
    _check_bits(bits)
    expected = -(-count * bits // 8)
    if packed.shape[-1] != expected:
        raise StateError(
            f"{count} codes of {bits} bits take {expected} bytes, given {packed.shape[-1]}"
        )
    codes: torch.Tensor = select("unpack", layout, packed.device).kernel(packed, bits, count)
    return codes


def _check_bits(bits: int) -> None:
    if not 0 <= bits <= MAX_BITS:
        raise StateError(f"codes have 0 to {MAX_BITS} bits, given {bits}")
