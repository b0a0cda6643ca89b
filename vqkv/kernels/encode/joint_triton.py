"""Codes chosen together on a GPU: the search and all sweeps over all groups in one launch."""

from __future__ import annotations

import torch

from vqkv.kernels.encode import triton
from vqkv.kernels.encode.joint import Coupling, JointLayout
from vqkv.kernels.select import Kernel
from vqkv.layouts import Layout

#: Of a code, and channels of a unit: a vector's scores and errors are held at once.
MOST_BITS, MOST_CHANNELS = 8, 256


def encode_joint(
    x: torch.Tensor, codewords: torch.Tensor, coupled: Coupling, sweeps: int, width: int
) -> torch.Tensor:
    """Codes `[N, M, 1]`. Errors of groups push each other as fp16 numbers."""
    from vqkv.kernels.gpu import encode_ops

    codes: torch.Tensor = encode_ops.encode_joint(x, codewords, *coupled, sweeps)
    return codes


def refuses(layout: JointLayout, device: torch.device) -> str | None:
    """What `misfit` says, and wide searches."""
    if layout.width > 1:
        return f"a search that keeps {layout.width} choices, it keeps one"
    return misfit(layout.codes, device)


def misfit(layout: Layout, device: torch.device) -> str | None:
    """Why codes cannot be searched for: what `encode` refuses, long codes, or many channels."""
    bits = layout.segments[0].code_bits
    if bits > MOST_BITS:
        return f"codes of {bits} bits, up to {MOST_BITS} are searched for"
    if layout.head_dim > MOST_CHANNELS:
        return f"{layout.head_dim} channels of a unit, up to {MOST_CHANNELS} fit"
    return triton.refuses(layout, device)


KERNEL = Kernel("encode_joint", "triton", encode_joint, refuses, 100, ("cpu",))
