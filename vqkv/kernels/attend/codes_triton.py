"""Attention on codes on a GPU: split-KV, every page read once for all queries of a KV head."""

from __future__ import annotations

import torch

from vqkv.kernels import gpu
from vqkv.kernels.attend.codes import AttendLayout, Coded, Partial, unfit
from vqkv.kernels.select import Kernel

DIMS = (2, 4, 8, 16, 32)
STAGES = (1, 2, 4)
HEAD_DIMS = range(16, 257)


def attend_codes(query: torch.Tensor, coded: Coded) -> Partial:
    """Products in fp16 with fp32 sums; softmax in fp32. Codewords of fp32 are converted a call."""
    from vqkv.kernels.gpu import ops

    turns = (None, None, None) if coded.turns is None else coded.turns
    output, lse, key_mean = ops.attend_codes(
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
    """Besides the contract's conditions: dims and stages that registers can hold side by side."""
    reason = gpu.unavailable_reason(device) or unfit(layout)
    if reason is not None:
        return reason
    for name, stream in (("keys", layout.keys), ("values", layout.values)):
        segment = stream.segments[0]
        if segment.dim not in DIMS or segment.stages not in STAGES:
            return (
                f"{name}: subvectors of {segment.dim} channels in {segment.stages} stages; "
                f"{DIMS} channels in {STAGES} stages are read"
            )
        if stream.head_dim not in HEAD_DIMS:
            return f"{name}: head dim {stream.head_dim} is not within 16 to 256"
    return None


KERNEL = Kernel(
    "attend_codes", "triton", attend_codes, refuses, speed=100, only_asked_for_on=("cpu",)
)
