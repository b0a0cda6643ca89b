"""Codes chosen together, group by group, by whichever kernels encode and decode one group."""

from __future__ import annotations

import torch

from vqkv.kernels.decode import decode
from vqkv.kernels.encode import encode
from vqkv.kernels.select import Kernel, anywhere


def encode_joint(
    x: torch.Tensor, codewords: torch.Tensor, metric: torch.Tensor, sweeps: int
) -> torch.Tensor:
    """Codes `[N, M, 1]`."""
    units, dim = len(metric), x.shape[2]
    groups = x.shape[1] // units
    parts = x.unflatten(1, (units, groups))  # [N, U, G, d]
    books = codewords.unflatten(0, (units, groups))
    codes = x.new_zeros(len(x), units, groups, 1, dtype=torch.int32)
    errors = torch.zeros_like(parts)
    for _ in range(sweeps):
        for group in range(groups):
            others = errors.clone()
            others[:, :, group] = 0
            columns = metric[:, :, group * dim : (group + 1) * dim].float()  # [U, n, d]
            pushed = torch.einsum("nui,uid->nud", others.flatten(2), columns)
            own = books[:, group]
            codes[:, :, group] = encode(parts[:, :, group] - pushed, own)
            errors[:, :, group] = decode(codes[:, :, group], own) - parts[:, :, group]
    return codes.flatten(1, 2)


KERNEL = Kernel("encode_joint", "naive", encode_joint, anywhere, speed=0)
