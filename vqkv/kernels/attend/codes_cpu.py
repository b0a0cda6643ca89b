"""Attention on codes by the compiled CPU kernel (AVX-512, AVX2 or scalar, chosen at run time)."""

from __future__ import annotations

import torch

from vqkv.kernels import native
from vqkv.kernels.attend.codes import AttendLayout, unfit
from vqkv.kernels.native.attend import Prepared, attend_codes
from vqkv.kernels.select import Kernel


def refuses(layout: AttendLayout, device: torch.device) -> str | None:
    """It runs on CPUs, where the package was built with a C compiler."""
    return native.refusal(device) or unfit(layout)


KERNEL = Kernel("attend_codes", "cpu", attend_codes, refuses, speed=10, prepare=Prepared)
