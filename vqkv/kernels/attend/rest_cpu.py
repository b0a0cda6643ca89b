"""What follows attention on codes, by the compiled kernel."""

from __future__ import annotations

import torch

from vqkv.kernels import native
from vqkv.kernels.native.rest import TYPES, attend_rest
from vqkv.kernels.select import Kernel


def refuses(dtype: torch.dtype, device: torch.device) -> str | None:
    """It reads fp32 and bf16, on CPUs, where the package was built with a C compiler."""
    if dtype not in TYPES:
        return f"exact states are {dtype}, it reads {' and '.join(map(str, TYPES))}"
    return native.refusal(device)


KERNEL = Kernel("attend_rest", "cpu", attend_rest, refuses, speed=10)
