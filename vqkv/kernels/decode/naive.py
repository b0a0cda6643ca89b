"""Look-up of codewords by one gather over all codebooks."""

from __future__ import annotations

import torch

from vqkv.kernels.select import Kernel, anywhere


def decode(codes: torch.Tensor, codewords: torch.Tensor) -> torch.Tensor:
    """Vectors `[N, M, d]` (fp32) of `codes` `[N, M, S]` under `codewords` `[M, S, K, d]`."""
    books, stages, size, dim = codewords.shape
    first = torch.arange(books * stages, device=codes.device).mul_(size).view(books, stages)
    rows = codes.long() + first
    table = codewords.float().reshape(books * stages * size, dim)
    return torch.nn.functional.embedding(rows, table).sum(-2)


KERNEL = Kernel("decode", "naive", decode, anywhere, speed=0)
