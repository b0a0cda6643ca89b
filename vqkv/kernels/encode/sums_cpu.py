"""The nearest sum of two codewords by the compiled CPU kernel."""

from __future__ import annotations

import torch

from vqkv.kernels import native
from vqkv.kernels.native.sums import encode_sums
from vqkv.kernels.select import Kernel
from vqkv.layouts import Layout


def refuses(layout: Layout, device: torch.device) -> str | None:
    """It runs on CPUs, where the package was built with a C compiler."""
    return native.refusal(device)


KERNEL = Kernel("encode_sums", "cpu", encode_sums, refuses, speed=10)
