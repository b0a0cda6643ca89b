"""Bit-packing through single bits, with short cuts where codes fill bytes evenly."""

from __future__ import annotations

import torch

from vqkv.kernels.select import Kernel, anywhere


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes `[..., n]` to bytes `[..., ceil(n · bits / 8)]`; spare bits of the last byte are 0."""
    if bits == 8:
        return codes.to(torch.uint8)
    if bits == 16:
        return torch.stack([codes & 0xFF, codes >> 8], -1).flatten(-2).to(torch.uint8)
    if bits == 0:
        return codes.new_empty((*codes.shape[:-1], 0), dtype=torch.uint8)
    count = codes.shape[-1]
    size = -(-count * bits // 8)
    shifts = torch.arange(bits, dtype=torch.int32, device=codes.device)
    stream = ((codes.to(torch.int32).unsqueeze(-1) >> shifts) & 1).to(torch.uint8).flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, 8 * size - count * bits))
    weights = (1 << torch.arange(8, device=codes.device)).to(torch.uint8)
    octets = stream.reshape(*codes.shape[:-1], size, 8)
    return (octets * weights).sum(-1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Bytes `[..., ceil(n · bits / 8)]` to codes `[..., n]` (int32)."""
    if bits == 8:
        return packed.to(torch.int32)
    if bits == 16:
        low, high = packed[..., 0::2], packed[..., 1::2]
        return low.to(torch.int32) | (high.to(torch.int32) << 8)
    if bits == 0:
        return torch.zeros(*packed.shape[:-1], count, dtype=torch.int32, device=packed.device)
    if bits == 12:
        # Three bytes hold two codes.
        triples = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % 3)).to(torch.int32)
        first, middle, last = triples.unflatten(-1, (-1, 3)).unbind(-1)
        both = torch.stack([first | (middle & 15) << 8, middle >> 4 | last << 4], -1)
        return both.flatten(-2)[..., :count]
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        codes: torch.Tensor = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
        return codes.flatten(-2)[..., :count].to(torch.int32)
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = ((packed.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., : count * bits]
    weights = (1 << torch.arange(bits, device=packed.device)).to(torch.int32)
    fields = stream.reshape(*packed.shape[:-1], count, bits)
    return (fields * weights).sum(-1, dtype=torch.int32)


PACK = Kernel("pack", "naive", pack, anywhere, speed=0)
UNPACK = Kernel("unpack", "naive", unpack, anywhere, speed=0)
