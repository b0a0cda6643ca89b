"""Look-up of codewords on a GPU, without the transient of all stages' codewords."""

from __future__ import annotations

import torch

from vqkv.kernels import gpu
from vqkv.kernels.select import Kernel
from vqkv.layouts import Layout


def decode(codes: torch.Tensor, codewords: torch.Tensor) -> torch.Tensor:
    """Vectors `[N, M, d]` (fp32) of `codes` `[N, M, S]` under `codewords` `[M, S, K, d]`."""
    from vqkv.kernels.gpu import decode_ops

    vectors: torch.Tensor = decode_ops.decode(codes, codewords)
    return vectors


def refuses(layout: Layout, device: torch.device) -> str | None:
    """It runs every layout."""
    return gpu.unavailable_reason(device)


KERNEL = Kernel("decode", "triton", decode, refuses, speed=100, only_asked_for_on=("cpu",))
