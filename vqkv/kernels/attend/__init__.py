"""Attention in blocks of tokens, whose partial results are merged by log-sum-exp.

Keys and values are decoded before it; keys that commute with RoPE may come as codes. Kernels that
are given nothing but codes have a contract of their own, in `vqkv.kernels.attend.codes`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from vqkv.kernels.attend.commuting import CommutingKeys
from vqkv.kernels.select import select
from vqkv.layouts import Layout


class Block(NamedTuple):
    """A run of n tokens: keys and values `[B, H, n, D]`, and which query sees which.

    Keys may still be coded, where their codes commute with RoPE. `visible` is bool, and broadcasts
    to `[B, Q, t, n]`.
    """

    keys: torch.Tensor | CommutingKeys
    values: torch.Tensor
    visible: torch.Tensor


class Reading(NamedTuple):
    """What a kernel is chosen by: the keys' layout, and the query heads that read one KV head."""

    keys: Layout
    readers: int


def attend(
    query: torch.Tensor,
    blocks: Iterable[Block],
    scaling: float,
    reading: Reading,
    null_scores: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention output `[B, Q, t, D]` of queries `[B, Q, t, D]` over all blocks together.

    Null scores `[Q]` take part in each query head's softmax and have no value.

    Raises:
        KernelError: no kernel attends on this layout; the message gives the reasons.
    """
    kernel = select("attend", reading, query.device).kernel
    output: torch.Tensor = kernel(query, blocks, scaling, null_scores)
    return output
