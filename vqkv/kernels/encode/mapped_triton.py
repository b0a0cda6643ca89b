"""States to bytes on a GPU: one launch for nearest codewords, beside one that prepares them."""

from __future__ import annotations

import torch

from vqkv.kernels.encode import joint_triton, mapped_naive
from vqkv.kernels.encode.joint import Coupling
from vqkv.kernels.encode.mapped import Maps
from vqkv.kernels.select import Kernel
from vqkv.layouts import Layout

#: Matrix instructions of older GPUs take their operands from registers, and there are too few.
LEAST_CAPABILITY = 9
#: Channels of a head whose map fits into shared memory.
MOST_CHANNELS = 128


def encode_mapped(
    x: torch.Tensor,
    source: torch.Tensor | None,
    maps: Maps,
    codewords: torch.Tensor,
    coupled: Coupling | None,
    sweeps: int,
    width: int,
) -> torch.Tensor:
    """Codes `[N, H, M / H]` (uint8).

    Maps are products of fp16 halves, about as exact as fp32. Where codes are chosen together, torch
    maps the states, and `encode_joint` searches.
    """
    from vqkv.kernels.gpu import encode_ops

    if coupled is not None:
        return mapped_naive.encode_mapped(x, source, maps, codewords, coupled, sweeps, width)
    codes: torch.Tensor = encode_ops.encode_mapped(x, source, *maps, codewords)
    return codes


def refuses(layout: Layout, device: torch.device) -> str | None:
    """What codes chosen together are refused for, wide heads, and GPUs before Hopper."""
    reason = joint_triton.misfit(layout, device)
    if reason is None and layout.head_dim > MOST_CHANNELS:
        return f"{layout.head_dim} channels of a head, maps of up to {MOST_CHANNELS} fit"
    if reason is None and device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < LEAST_CAPABILITY:
            return f"compute capability {major}.{minor}, Hopper's 9.0 is the least"
    return reason


# No GPU has run it yet: it has to be asked for until one has.
KERNEL = Kernel("encode_mapped", "triton", encode_mapped, refuses, 100, ("cpu", "cuda"))
