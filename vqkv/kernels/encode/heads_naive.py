"""Codes of heads chosen together, head by head, by whichever kernels encode and decode."""

from __future__ import annotations

import torch

from vqkv.kernels.decode import decode
from vqkv.kernels.encode import encode
from vqkv.kernels.encode.heads import head_by_head, target
from vqkv.kernels.select import Kernel, anywhere


def encode_heads(
    x: torch.Tensor, codewords: torch.Tensor, coupling: torch.Tensor, sweeps: int
) -> torch.Tensor:
    """Codes `[N, M, 1]`."""
    codes = x.new_zeros(*x.shape[:2], 1, dtype=torch.int32)
    errors = torch.zeros_like(x)
    for _ in range(sweeps):
        for own, columns in head_by_head(coupling, len(codewords)):
            found = encode(target(x, errors, own, columns), codewords[own])
            codes[:, own] = found
            errors[:, own] = decode(found, codewords[own]) - x[:, own]
    return codes


KERNEL = Kernel("encode_heads", "naive", encode_heads, anywhere, speed=0)
