"""Attention on codes on a Hopper GPU, codebooks in shared memory as fp8."""

from __future__ import annotations

import torch

from vqkv.kernels import cuda
from vqkv.kernels.attend.codes import AttendLayout, Coded, Partial, unfit
from vqkv.kernels.attend.codes_op import first_odd, through
from vqkv.kernels.cuda.configs import odd_shape
from vqkv.kernels.select import Kernel


def attend_codes(query: torch.Tensor, coded: Coded) -> Partial:
    """Codewords rounded to fp8 (e4m3, by 1/16 at most), products in fp16 with fp32 sums."""
    from vqkv.kernels.cuda import attend_ops

    return through(attend_ops.attend_codes, query, coded)


def refuses(layout: AttendLayout, device: torch.device) -> str | None:
    """Besides the contract's conditions, shapes whose tables fit."""
    missing = cuda.unavailable_reason(device)
    if reason := missing or unfit(layout) or first_odd(layout, odd_shape):
        return reason
    keys, values = (stream.segments[0].dim for stream in layout)
    return None if keys == values else f"codewords of {keys} and {values} channels; one dim is read"


KERNEL = Kernel("attend_codes", "cuda", attend_codes, refuses, speed=200)
