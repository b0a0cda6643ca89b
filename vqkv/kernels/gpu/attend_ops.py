"""Attention on codes as a `torch.library` custom op, for torch.compile and CUDA graphs."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkv.kernels.attend.codes_op import Found, fake
from vqkv.kernels.gpu.attend import attend_split, merge_splits
from vqkv.kernels.gpu.configs import ROWS, AttendConfig, split_count
from vqkv.kernels.gpu.tensors import half, multiprocessors, readable, words
from vqkv.layouts import PAGE_TOKENS


@torch.library.custom_op("vqkv::attend_codes", mutates_args=(), device_types=("cuda", "cpu"))
def attend_codes(
    query: Tensor,
    key_codes: Tensor,
    key_books: Tensor,
    value_codes: Tensor,
    value_books: Tensor,
    start: Tensor,
    stop: Tensor,
    pages: Tensor | None,
    page_turns: Tensor | None,
    offset_turns: Tensor | None,
    pairs: Tensor | None,
    key_sums: bool,
) -> Found:
    """Output, log-sum-exp and key means (empty unless asked for) of `attend.codes.Coded`."""
    batch, queries, length, head_dim = query.shape
    heads = key_books.shape[0]
    rows = queries // heads * length
    query = readable(query)
    key_codes, keys = words(key_codes, key_books)
    value_codes, values = words(value_codes, value_books)
    config = AttendConfig(
        head_dim,
        keys,
        values,
        paged=pages is not None,
        rope=page_turns is not None,
        key_sums=key_sums,
    )
    blocks = -(-rows // ROWS)
    count = -(-key_codes.shape[2] // PAGE_TOKENS) if pages is None else pages.shape[1]
    processors = multiprocessors(query.device)
    splits = split_count(
        batch * heads * blocks,
        count,
        processors,
        config.resident(),
    )
    # What a launch does not read may be any tensor.
    page_turns = query if page_turns is None else readable(page_turns)
    offset_turns = query if offset_turns is None else readable(offset_turns)
    parts = query.new_empty((splits, *query.shape), dtype=torch.float32)
    part_lse = query.new_empty((splits, *query.shape[:3]), dtype=torch.float32)
    part_means = torch.empty_like(parts) if key_sums else parts.new_empty(0)
    attend_split[(heads * blocks * batch * splits,)](
        query,
        key_codes,
        half(key_books),
        value_codes,
        half(value_books),
        start,
        stop,
        start if pages is None else pages.contiguous(),
        page_turns,
        offset_turns,
        start if pairs is None else pairs.contiguous(),
        parts,
        part_lse,
        part_means if key_sums else parts,
        *key_codes.stride()[:3],
        *value_codes.stride()[:3],
        count,
        page_turns[0].numel() if page_turns.shape[0] > 1 else 0,
        batch,
        heads,
        rows,
        splits,
        processors,
        **config.constants(),
        **config.options(),
    )
    return merge(parts, part_lse, part_means)


def merge(parts: Tensor, part_lse: Tensor, part_means: Tensor) -> Found:
    """The whole of splits' outputs `[splits, .., D]`, log-sum-exps and key means, if any."""
    splits, head_dim, key_sums = len(parts), parts.shape[-1], part_means.numel() > 0
    if splits == 1:
        return parts[0], part_lse[0], part_means[0] if key_sums else part_means
    output, lse = torch.empty_like(parts[0]), torch.empty_like(part_lse[0])
    means = torch.empty_like(output) if key_sums else parts.new_empty(0)
    merge_splits[(lse.numel(),)](
        parts,
        part_lse,
        part_means if key_sums else parts,
        output,
        lse,
        means if key_sums else output,
        lse.numel(),
        D=head_dim,
        SPLITS=splits,
        KEY_SUMS=key_sums,
        num_warps=4,
    )
    return output, lse, means


attend_codes.register_fake(fake)
