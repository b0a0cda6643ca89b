"""Attention on codes by decoding all of them: the truth that fused kernels are held to."""

from __future__ import annotations

import torch
from einops import rearrange

from vqkv.kernels.attend.codes import (
    AttendLayout,
    Coded,
    Partial,
    Plane,
    Turns,
    in_coded_order,
    unfit,
)
from vqkv.kernels.select import Kernel
from vqkv.layouts import PAGE_TOKENS


def attend_codes(query: torch.Tensor, coded: Coded) -> Partial:
    """Scores, softmax and sums over `[B, Q, t, T]` at once, in fp32."""
    keys, values = (decoded(plane, coded.pages) for plane in (coded.keys, coded.values))
    if coded.turns is not None:  # there may be room for pages that have none yet
        paged = coded.turns.page.shape[1] * PAGE_TOKENS
        keys, values = keys[:, :, :paged], values[:, :, :paged]
    heads, tokens = keys.shape[1:3]
    turned = keys if coded.turns is None else rotated(keys, coded.turns)
    q = rearrange(in_coded_order(query.float(), coded.order), "b (h g) t d -> b h (g t) d", h=heads)
    scores = q @ turned.transpose(2, 3)
    slot = torch.arange(tokens, device=query.device)
    counts = (slot >= coded.start[:, None]) & (slot < coded.stop[:, None])  # [B, T]
    scores = scores.masked_fill(~counts[:, None, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).nan_to_num(0.0)  # no tokens: −inf − −inf

    def rows(x: torch.Tensor) -> torch.Tensor:
        """Of `[B, H, G · t, ...]`, `[B, Q, t, ...]`."""
        split: torch.Tensor = x.unflatten(2, (-1, query.shape[2]))
        return split.flatten(1, 2)

    key_mean = rows(weights @ keys) if coded.key_sums else None
    return Partial(rows(weights @ values), rows(lse), key_mean)


def decoded(plane: Plane, pages: torch.Tensor | None = None) -> torch.Tensor:
    """Vectors `[B, H, T, D]` (fp32) in coded order."""
    codes = plane.codes
    if pages is not None:
        codes = rearrange(codes[pages.long()], "b p h o c -> b h (p o) c")
    heads, groups, stages, size, dim = plane.codewords.shape
    table = plane.codewords.float().reshape(-1, dim)
    first = torch.arange(heads * groups * stages, device=codes.device).mul_(size)
    rows = codes.long() + first.view(heads, 1, groups * stages)
    vectors: torch.Tensor = table[rows].unflatten(3, (groups, stages)).sum(4)
    return vectors.flatten(3)


def rotated(keys: torch.Tensor, turns: Turns) -> torch.Tensor:
    """Keys `[B, H, T, D]` at their positions."""
    tokens = keys.shape[2]
    slot = torch.arange(tokens, device=keys.device)
    page = torch.view_as_complex(turns.page.float().contiguous())
    offset = torch.view_as_complex(turns.offset.float().contiguous())
    turn = page[:, slot // PAGE_TOKENS] * offset[slot % PAGE_TOKENS]  # [B or 1, T, D / 2]
    turn = rearrange(turn[:, :, turns.pairs.long()], "b t h p -> b h t p")
    pairs = torch.view_as_complex(keys.unflatten(3, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(3)


def refuses(layout: AttendLayout, device: torch.device) -> str | None:
    """It runs whatever the contract allows, on any device."""
    return unfit(layout)


KERNEL = Kernel("attend_codes", "naive", attend_codes, refuses, speed=0)
