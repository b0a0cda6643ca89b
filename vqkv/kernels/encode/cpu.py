"""Nearest codewords by the compiled CPU kernel (AVX-512, AVX2 or scalar, chosen at run time)."""

from __future__ import annotations

import torch

from vqkv.kernels import native
from vqkv.kernels.encode.naive import greedy
from vqkv.kernels.select import Kernel
from vqkv.layouts import Layout


def encode(x: torch.Tensor, codewords: torch.Tensor) -> torch.Tensor:
    """Greedy codes `[N, M, S]` of `x` `[N, M, d]` under `codewords` `[M, S, K, d]`."""
    return greedy(native.nearest, x, codewords)


def refuses(layout: Layout, device: torch.device) -> str | None:
    """It runs on CPUs, where the package was built with a C compiler."""
    return native.refusal(device)


KERNEL = Kernel("encode", "cpu", encode, refuses, speed=10)
