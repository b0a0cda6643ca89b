"""Codes chosen together, group by group, by whichever kernels encode and decode one group."""

from __future__ import annotations

import torch

from vqkv.kernels.decode import decode
from vqkv.kernels.encode import encode
from vqkv.kernels.encode.joint import Coupling, ahead_words
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
    ahead = ahead_words(books, coupled.ahead)
    if width == 1:
        errors = _nearest(parts, books, ahead, coupled.ahead)
    else:
        rows = max(1, MAX_HELD // (units * width * codewords.shape[2]))
        found = [_search(part, books, ahead, coupled.ahead, width) for part in parts.split(rows)]
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


def _nearest(
    x: torch.Tensor, books: torch.Tensor, ahead: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """Errors `[N, U, G, d]` after a search through the groups that keeps one choice."""
    dim = x.shape[3]
    # Where nothing is chosen all of x is missing: that gives x V_gg, and V has nothing of later
    # groups in a group's columns.
    errors = -x
    for group in range(x.shape[2]):
        columns = v[:, :, group * dim : (group + 1) * dim]
        target = -torch.einsum("nui,uid->nud", errors.flatten(2), columns)
        code = encode(target, ahead[:, group].unsqueeze(1))
        errors[:, :, group] = decode(code, books[:, group].unsqueeze(1)) - x[:, :, group]
    return errors


def _search(
    x: torch.Tensor, books: torch.Tensor, ahead: torch.Tensor, v: torch.Tensor, width: int
) -> torch.Tensor:
    """Errors `[N, U, G, d]` after a search through the groups that keeps `width` choices."""
    count, units, groups, dim = x.shape
    errors = x.new_zeros(count, units, 1, groups * dim)  # of each choice so far, W growing
    costs = x.new_zeros(count, units, 1)
    norms = ahead.square().sum(-1)
    for group in range(groups):
        own = slice(group * dim, (group + 1) * dim)
        missing = errors.clone()
        missing[..., own] = -x[:, :, group, None]
        target = -torch.einsum("nuwi,uid->nuwd", missing, v[:, :, own])
        distances = norms[:, group].unsqueeze(1) - 2 * target @ ahead[:, group].mT
        at_no_distance = costs + target.square().sum(-1)
        totals = (at_no_distance.unsqueeze(3) + distances).flatten(2)
        costs, chosen = totals.topk(min(width, totals.shape[2]), largest=False)
        parent, code = chosen // books.shape[2], chosen % books.shape[2]
        errors = errors.gather(2, parent.unsqueeze(3).expand(-1, -1, -1, groups * dim))
        word = code.unsqueeze(3).expand(-1, -1, -1, dim)
        error = books[:, group].expand(count, -1, -1, -1).gather(2, word) - x[:, :, group, None]
        errors[..., own] = error
    best: torch.Tensor = errors[:, :, 0].unflatten(2, (groups, dim))
    return best


KERNEL = Kernel("encode_joint", "naive", encode_joint, anywhere, speed=0)
