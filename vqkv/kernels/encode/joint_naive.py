"""Codes chosen together, group by group, by whichever kernels encode and decode one group."""

from __future__ import annotations

import torch

from vqkv.kernels.decode import decode
from vqkv.kernels.encode import encode
from vqkv.kernels.encode.joint import Coupling
from vqkv.kernels.select import Kernel, anywhere

#: Scores of a search held at a time.
MAX_HELD = 1 << 22


def encode_joint(
    x: torch.Tensor, codewords: torch.Tensor, coupled: Coupling, sweeps: int, width: int
) -> torch.Tensor:
    """Codes `[N, M, 1]`."""
    metric = coupled.metric
    units, dim = len(metric), x.shape[2]
    parts = x.unflatten(1, (units, -1))  # [N, U, G, d]
    books = codewords[:, 0].float().unflatten(0, (units, -1))  # [U, G, K, d]
    rows = max(1, MAX_HELD // (units * width * codewords.shape[2]))
    found = [_search(part, books, coupled.ahead, width) for part in parts.split(rows)]
    errors = torch.cat(found)
    codes = x.new_zeros(*parts.shape[:3], 1, dtype=torch.int32)
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


def _search(x: torch.Tensor, books: torch.Tensor, ahead: torch.Tensor, width: int) -> torch.Tensor:
    """Errors `[N, U, G, d]` after a search through the groups that looks ahead."""
    count, units, groups, dim = x.shape
    errors = x.new_zeros(count, units, 1, groups * dim)  # of each choice so far, W growing
    costs = x.new_zeros(count, units, 1)
    for group in range(groups):
        own = slice(group * dim, (group + 1) * dim)
        error = books[:, group] - x[:, :, group, None]  # [N, U, K, d]
        # What Vᵀ e is in the group's channels, by errors before it and by its own.
        before = torch.einsum("nuwi,uid->nuwd", errors, ahead[:, :, own])
        by_own = error @ ahead[:, own, own]
        more = by_own.square().sum(-1).unsqueeze(2) + 2 * before @ by_own.mT
        totals = (costs.unsqueeze(3) + before.square().sum(-1, keepdim=True) + more).flatten(2)
        costs, chosen = totals.topk(min(width, totals.shape[2]), largest=False)
        parent, code = chosen // more.shape[3], chosen % more.shape[3]
        errors = errors.gather(2, parent.unsqueeze(3).expand(-1, -1, -1, groups * dim))
        errors[..., own] = error.gather(2, code.unsqueeze(3).expand(-1, -1, -1, dim))
    best: torch.Tensor = errors[:, :, 0].unflatten(2, (groups, dim))
    return best


KERNEL = Kernel("encode_joint", "naive", encode_joint, anywhere, speed=0)
