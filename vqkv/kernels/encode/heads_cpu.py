"""Codes of heads chosen together by the compiled CPU kernel."""

from __future__ import annotations

import torch

from vqkv.kernels import native
from vqkv.kernels.native.heads import encode_heads
from vqkv.kernels.select import Kernel
from vqkv.layouts import Layout


def refuses(layout: Layout, device: torch.device) -> str | None:
    """It runs on CPUs, where the package was built with a C compiler."""
    return native.refusal(device)


KERNEL = Kernel("encode_heads", "cpu", encode_heads, refuses, speed=10)
