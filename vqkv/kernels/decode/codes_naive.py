"""Pages of codes to states by torch, the truth for the kernel on a GPU."""

from __future__ import annotations

import torch

from vqkv.kernels.attend.codes import Plane, Turns
from vqkv.kernels.attend.codes_naive import decoded, rotated
from vqkv.kernels.decode.codes import unreadable
from vqkv.kernels.select import Kernel
from vqkv.layouts import Layout


def decode_codes(
    plane: Plane,
    tokens: range,
    turns: Turns | None,
    pages: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """States `[B, H, n, D]` of a range of tokens; decodes all of them on the way."""
    states = decoded(plane, pages)
    if turns is not None:
        states = rotated(states, turns)
    return states[:, :, tokens.start : tokens.stop].to(dtype)


def refuses(layout: Layout, device: torch.device) -> str | None:
    """It runs whatever the contract allows, on any device."""
    return unreadable(layout)


KERNEL = Kernel("decode_codes", "naive", decode_codes, refuses, speed=0)
