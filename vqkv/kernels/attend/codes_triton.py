"""Attention on codes on a GPU: split-KV, every page read once for all queries of a KV head."""

from __future__ import annotations

import torch

from vqkv.kernels import gpu
from vqkv.kernels.attend.codes import AttendLayout, Coded, Partial, unfit
from vqkv.kernels.attend.codes_op import first_odd, through
from vqkv.kernels.gpu.configs import odd_shape
from vqkv.kernels.select import Kernel


def attend_codes(query: torch.Tensor, coded: Coded) -> Partial:
    """Products in fp16 with fp32 sums; softmax in fp32. fp32 codewords are converted once."""
    from vqkv.kernels.gpu import attend_ops

    return through(attend_ops.attend_codes, query, coded)


def refuses(layout: AttendLayout, device: torch.device) -> str | None:
    """Besides the contract's conditions, shapes that registers hold."""
    return gpu.unavailable_reason(device) or unfit(layout) or first_odd(layout, odd_shape)


KERNEL = Kernel(
    "attend_codes", "triton", attend_codes, refuses, speed=100, only_asked_for_on=("cpu",)
)
