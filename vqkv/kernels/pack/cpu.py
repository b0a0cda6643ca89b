"""Bit-packing by the compiled CPU kernel."""

from __future__ import annotations

import torch

from vqkv.kernels import native
from vqkv.kernels.native.pack import pack, unpack
from vqkv.kernels.select import Kernel
from vqkv.layouts import Layout


def refuses(layout: Layout, device: torch.device) -> str | None:
    """It runs on CPUs, where the package was built with a C compiler."""
    return native.refusal(device)


PACK = Kernel("pack", "cpu", pack, refuses, speed=10)
UNPACK = Kernel("unpack", "cpu", unpack, refuses, speed=10)
