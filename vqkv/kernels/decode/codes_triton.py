"""Pages of codes to states on a GPU: every code read once, turned in registers."""

from __future__ import annotations

import torch

from vqkv.kernels import gpu
from vqkv.kernels.attend.codes import Plane, Turns
from vqkv.kernels.decode.codes import unreadable
from vqkv.kernels.gpu.configs import odd_shape
from vqkv.kernels.select import Kernel
from vqkv.layouts import Layout


def decode_codes(
    plane: Plane,
    tokens: range,
    turns: Turns | None,
    pages: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """States `[B, H, n, D]` of a range of tokens, codewords read in fp16."""
    from vqkv.kernels.gpu import decode_ops

    turned = (None, None, None) if turns is None else turns
    states: torch.Tensor = decode_ops.decode_pages(
        *plane, pages, *turned, tokens.start, len(tokens), dtype
    )
    return states


def refuses(layout: Layout, device: torch.device) -> str | None:
    """Besides the contract's conditions, shapes that registers hold."""
    return gpu.unavailable_reason(device) or unreadable(layout) or odd_shape(layout)


KERNEL = Kernel(
    "decode_codes", "triton", decode_codes, refuses, speed=100, only_asked_for_on=("cpu",)
)
