"""Attention on codes on a GPU: split-KV, every page read once for all queries of a KV head."""

from __future__ import annotations

import torch

from vqkv.kernels import gpu
from vqkv.kernels.attend.codes import AttendLayout, Coded, Partial, unfit
from vqkv.kernels.gpu.configs import odd_shape
from vqkv.kernels.select import Kernel


def attend_codes(query: torch.Tensor, coded: Coded) -> Partial:
    """Products in fp16 with fp32 sums; softmax in fp32. fp32 codewords are converted once."""
    from vqkv.kernels.gpu import attend_ops

    turns = (None, None, None) if coded.turns is None else coded.turns
    output, lse, key_mean = attend_ops.attend_codes(
        query,
        *coded.keys,
        *coded.values,
        coded.start,
        coded.stop,
        coded.pages,
        *turns,
        coded.key_sums,
    )
    return Partial(output, lse, key_mean if coded.key_sums else None)


def refuses(layout: AttendLayout, device: torch.device) -> str | None:
    """Besides the contract's conditions, shapes that registers hold."""
    reason = gpu.unavailable_reason(device) or unfit(layout)
    if reason is not None:
        return reason
    odd = {name: odd_shape(stream) for name, stream in layout._asdict().items()}
    return next((f"{name}: {reason}" for name, reason in odd.items() if reason), None)


KERNEL = Kernel(
    "attend_codes", "triton", attend_codes, refuses, speed=100, only_asked_for_on=("cpu",)
)
