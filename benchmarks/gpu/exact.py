"""The baseline: split-KV attention on exact fp16 keys and values, as ours on codes but for them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vqkv.kernels.gpu.attend import merge_splits
from vqkv.kernels.gpu.configs import split_count
from vqkv.kernels.gpu.tensors import multiprocessors

BLOCK = 64
RESIDENT = 4


@triton.jit
def exact_split(
    query, keys, values, output, lse, tokens, heads, rows, splits,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One split of one KV head. Grid: (B · H, splits); all tensors contiguous."""
    both = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, D)
    there = (row < rows)[None, :]
    q = tl.load(query + (both * rows + row[None, :]) * D + channel[:, None], mask=there, other=0.0)
    q = (q.to(tl.float32) * 1.4426950408889634).to(tl.float16)
    blocks = tl.cdiv(tokens, BLOCK_T)
    share = tl.cdiv(blocks, splits)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_T, ROWS], tl.float32)
    total = tl.zeros([D, ROWS], tl.float32)
    for block in range(split * share, tl.minimum((split + 1) * share, blocks)):
        slot = block * BLOCK_T + tl.arange(0, BLOCK_T)
        place = (both * tokens + slot) * D
        present = slot < tokens
        k = tl.load(keys + place[:, None] + channel[None, :], mask=present[:, None], other=0.0)
        v = tl.load(values + place[None, :] + channel[:, None], mask=present[None, :], other=0.0)
        scores = tl.where(present[:, None], tl.dot(k, q), float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 0))
        p = tl.exp2(scores - new_top[None, :])
        scale = tl.exp2(top - new_top)
        top = new_top
        weight = weight * scale[None, :] + p
        total = tl.dot(v, p.to(tl.float16), total * scale[None, :])
    weight = tl.sum(weight, 0)
    weight = tl.where(weight > 0, weight, 1.0)
    place = (split * tl.num_programs(0) + both) * rows + row
    tl.store(lse + place, (top + tl.log2(weight)) * 0.6931471805599453, mask=row < rows)
    where = output + place[None, :] * D + channel[:, None]
    tl.store(where, total / weight[None, :], mask=there)


def exact(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Output `[B, Q, t, D]` (fp32) of queries, scaled already, on `[B, H, T, D]`."""
    batch, heads, tokens, head_dim = keys.shape
    rows = query.shape[1] // heads * query.shape[2]
    programs = batch * heads
    pages = -(-tokens // BLOCK)
    splits = split_count(programs, pages, multiprocessors(query.device), RESIDENT)
    output = query.new_empty((splits, *query.shape), dtype=torch.float32)
    lse = query.new_empty((splits, *query.shape[:3]), dtype=torch.float32)
    block = max(16, 1 << (rows - 1).bit_length())
    exact_split[programs, splits](
        query.contiguous(), keys, values, output, lse, tokens, heads, rows, splits,
        D=head_dim, ROWS=block, BLOCK_T=BLOCK, num_warps=4, num_stages=3,
    )  # fmt: skip
    merged, merged_lse = torch.empty_like(output[0]), torch.empty_like(lse[0])
    merge_splits[(merged_lse.numel(),)](
        output, lse, output, merged, merged_lse, merged, merged_lse.numel(),
        D=head_dim, SPLITS=splits, KEY_SUMS=False, num_warps=4,
    )  # fmt: skip
    return merged
