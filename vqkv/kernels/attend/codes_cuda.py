"""Attention on codes on a Hopper GPU, codebooks in shared memory as fp8."""

from __future__ import annotations

import torch

from vqkv.kernels import cuda, gpu
from vqkv.kernels.attend.codes import AttendLayout, Coded, Partial, unfit
from vqkv.kernels.cuda.configs import odd_shape
from vqkv.kernels.select import Kernel


def attend_codes(query: torch.Tensor, coded: Coded) -> Partial:
    """Codewords rounded to fp8 (e4m3, by 1/16 at most), products in fp16 with fp32 sums."""
    from vqkv.kernels.cuda import attend_ops

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
    """Besides the contract's conditions, shapes whose tables fit; `merge_splits` needs Triton."""
    reason = cuda.unavailable_reason(device) or gpu.unavailable_reason(device) or unfit(layout)
    if reason is not None:
        return reason
    odd = {name: odd_shape(stream) for name, stream in layout._asdict().items()}
    if found := next((f"{name}: {reason}" for name, reason in odd.items() if reason), None):
        return found
    keys, values = (stream.segments[0].dim for stream in layout)
    return None if keys == values else f"codewords of {keys} and {values} channels; one dim is read"


#: Faster than Triton's by count only: until it is measured on a GPU, it waits to be asked for.
KERNEL = Kernel(
    "attend_codes", "cuda", attend_codes, refuses, speed=200, only_asked_for_on=("cuda",)
)
