"""Attention block by block in fp32, each block's partial softmax merged by log-sum-exp."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from einops import rearrange

from vqkv.kernels.attend.commuting import CommutingKeys
from vqkv.kernels.select import Kernel

if TYPE_CHECKING:
    from vqkv.kernels.attend import Block, Reading


#: Scaled queries `[B, Q, t, D]` and a block's keys to scores `[B, Q, t, n]`, all in fp32.
Score = Callable[[torch.Tensor, torch.Tensor | CommutingKeys], torch.Tensor]


def products(q: torch.Tensor, keys: torch.Tensor | CommutingKeys) -> torch.Tensor:
    """Scores `[B, Q, t, n]` of queries `[B, Q, t, D]` and keys `[B, H, n, D]`, decoded if coded."""
    keys = keys.decoded() if isinstance(keys, CommutingKeys) else keys.float()
    grouped = rearrange(q, "b (h g) t d -> b h (g t) d", h=keys.shape[1])
    return rearrange(grouped @ keys.mT, "b h (g t) n -> b (h g) t n", t=q.shape[2])


def attend(
    query: torch.Tensor,
    blocks: Iterable[Block],
    scaling: float,
    null_scores: torch.Tensor | None = None,
    score: Score = products,
) -> torch.Tensor:
    """Output `[B, Q, t, D]`, in the query's type; rows that see no token get zeros."""
    batch, queries, length, head_dim = query.shape
    q = query.float() * scaling
    output = torch.zeros(batch, queries, length, head_dim, device=query.device)
    lse = torch.full((batch, queries, length, 1), -torch.inf, device=query.device)
    if null_scores is not None:
        lse = lse.maximum(null_scores.float()[:, None, None])
    for block in blocks:
        output, lse = merged((output, lse), partial(q, block, score))
    return output.to(query.dtype)


def merged(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two partial softmaxes as one: outputs `[B, Q, t, D]` and log-sum-exps `[B, Q, t, 1]`."""
    lse = torch.logaddexp(first[1], second[1])
    # Where nothing has been seen yet both weights are exp(-inf + inf): nothing to add up.
    old, new = (torch.exp(part[1] - lse).nan_to_num(0.0) for part in (first, second))
    return old * first[0] + new * second[0], lse


def partial(
    q: torch.Tensor, block: Block, score: Score = products
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over one block: output `[B, Q, t, D]` and log-sum-exp `[B, Q, t, 1]`."""
    scores = score(q, block.keys).masked_fill(~block.visible, -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = torch.exp(scores - lse).nan_to_num(0.0)
    grouped = rearrange(weights, "b (h g) t n -> b h (g t) n", h=block.values.shape[1])
    output = grouped @ block.values.float()
    return rearrange(output, "b h (g t) d -> b (h g) t d", t=q.shape[2]), lse


def refuses(reading: Reading, device: torch.device) -> str | None:
    """Codes of one head have to be readable without the other heads'."""
    if reading.keys.head_local:
        return None
    return "codes or transforms mix heads; use read='decode'"


KERNEL = Kernel("attend", "naive", attend, refuses, speed=0)
