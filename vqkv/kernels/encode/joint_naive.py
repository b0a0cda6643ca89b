"""Codes chosen together, group by group, by whichever kernels encode and decode one group."""

from __future__ import annotations

import torch

from vqkv.kernels.decode import decode
from vqkv.kernels.encode import encode
from vqkv.kernels.select import Kernel, anywhere

#: Scores of a beam search held at a time.
MAX_HELD = 1 << 22


def encode_joint(
    x: torch.Tensor, codewords: torch.Tensor, metric: torch.Tensor, sweeps: int, width: int
) -> torch.Tensor:
    """Codes `[N, M, 1]`."""
    units, dim = len(metric), x.shape[2]
    parts = x.unflatten(1, (units, -1))  # [N, U, G, d]
    books = codewords[:, 0].unflatten(0, (units, -1))  # [U, G, K, d]
    codes = x.new_zeros(*parts.shape[:3], 1, dtype=torch.int32)
    errors = torch.zeros_like(parts)
    if width > 1:
        rows = max(1, MAX_HELD // (units * width * codewords.shape[2]))
        found = [_beam(part, books, metric.float(), width) for part in parts.split(rows)]
        errors = torch.cat(found) if found else errors
    for _ in range(sweeps):
        for group in range(parts.shape[2]):
            others = errors.clone()
            others[:, :, group] = 0
            columns = metric[:, :, group * dim : (group + 1) * dim].float()  # [U, n, d]
            pushed = torch.einsum("nui,uid->nud", others.flatten(2), columns)
            own = books[:, group].unsqueeze(1)
            codes[:, :, group] = encode(parts[:, :, group] - pushed, own)
            errors[:, :, group] = decode(codes[:, :, group], own) - parts[:, :, group]
    return codes.flatten(1, 2)


def _beam(x: torch.Tensor, books: torch.Tensor, metric: torch.Tensor, width: int) -> torch.Tensor:
    """Errors `[N, U, G, d]` after a beam search through the groups."""
    count, units, groups, dim = x.shape
    errors = x.new_zeros(count, units, 1, groups * dim)  # of each choice so far, W growing
    costs = x.new_zeros(count, units, 1)
    for group in range(groups):
        own = slice(group * dim, (group + 1) * dim)
        pushed = torch.einsum("nuwi,uid->nuwd", errors, metric[:, :, own])
        error = books[:, group] - x[:, :, group, None]  # [N, U, K, d]
        more = error.square().sum(-1).unsqueeze(2) + 2 * torch.einsum(
            "nuwd,nukd->nuwk", pushed, error
        )
        totals = (costs.unsqueeze(3) + more).flatten(2)
        costs, chosen = totals.topk(min(width, totals.shape[2]), largest=False)
        parent, code = chosen // more.shape[3], chosen % more.shape[3]
        errors = errors.gather(2, parent.unsqueeze(3).expand(-1, -1, -1, groups * dim))
        errors[..., own] = error.gather(2, code.unsqueeze(3).expand(-1, -1, -1, dim))
    best: torch.Tensor = errors[:, :, 0].unflatten(2, (groups, dim))
    return best


KERNEL = Kernel("encode_joint", "naive", encode_joint, anywhere, speed=0)
