"""Codes of heads chosen together on a GPU: all sweeps over all heads in one launch."""

from __future__ import annotations

import torch

from vqkv.kernels.encode import heads_naive, joint_triton
from vqkv.kernels.select import Kernel
from vqkv.layouts import Layout

#: Vectors from which on torch's products for all of them are faster than ours block by block: on an
#: H200 131,072 of 8 heads take 22 ms for 31 at d = 4, and 21.5 for 24 at d = 8.
MANY = 1 << 17
#: Channels of a head whose coupling with another fits into shared memory.
MOST_CHANNELS = 128


def encode_heads(
    x: torch.Tensor, codewords: torch.Tensor, coupling: torch.Tensor, sweeps: int
) -> torch.Tensor:
    """Codes `[N, M, 1]`. Errors of heads push each other as fp16 numbers."""
    from vqkv.kernels.gpu import encode_ops

    if len(x) >= MANY:
        return heads_naive.encode_heads(x, codewords, coupling, sweeps)
    codes: torch.Tensor = encode_ops.encode_heads(x, codewords, coupling, sweeps)
    return codes


def refuses(layout: Layout, device: torch.device) -> str | None:
    """What codes of groups chosen together are refused for, and wide heads."""
    reason = joint_triton.misfit(layout, device)
    if reason is None and layout.head_dim > MOST_CHANNELS:
        return f"{layout.head_dim} channels of a head, couplings of up to {MOST_CHANNELS} fit"
    return reason


KERNEL = Kernel("encode_heads", "triton", encode_heads, refuses, 100, ("cpu",))
