"""Nearest codewords on a GPU, by matrix instructions."""

from __future__ import annotations

import torch

from vqkv.kernels import gpu
from vqkv.kernels.select import Kernel
from vqkv.layouts import Layout

#: Beyond it a block of codewords, three times over in fp16, leaves no room for vectors.
MOST_DIMS = 32


def encode(x: torch.Tensor, codewords: torch.Tensor) -> torch.Tensor:
    """Greedy codes `[N, M, S]` of `x` `[N, M, d]` under `codewords` `[M, S, K, d]`.

    Scores are right to about 2⁻²⁰ of the longest codeword's square, or of its length times a longer
    vector's.
    """
    from vqkv.kernels.gpu import encode_ops

    codes: torch.Tensor = encode_ops.encode(x, codewords)
    return codes


def refuses(layout: Layout, device: torch.device) -> str | None:
    """Subvectors have to fit."""
    reason = gpu.unavailable_reason(device)
    if reason is None and layout.segments[0].dim > MOST_DIMS:
        return f"subvectors of {layout.segments[0].dim} channels, up to {MOST_DIMS} fit"
    return reason


KERNEL = Kernel("encode", "triton", encode, refuses, speed=100, only_asked_for_on=("cpu",))
