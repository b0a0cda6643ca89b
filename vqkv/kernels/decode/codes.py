"""A range of pages of codes to states, turned by RoPE where keys were coded before it."""

from __future__ import annotations

import torch

from vqkv.errors import KernelError
from vqkv.kernels.attend.codes import Plane, Turns
from vqkv.kernels.select import Kernel, select
from vqkv.layouts import PAGE_TOKENS, Layout


def decode_codes(
    plane: Plane,
    tokens: range,
    layout: Layout,
    turns: Turns | None = None,
    pages: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """States `[B, H, n, D]` of n neighbouring tokens, in coded order.

    Args:
        plane: codes and codebooks of one stream.
        tokens: which; it begins with a page.
        layout: of the stream.
        turns: turn the states to their positions, as keys coded before RoPE need.
        pages: `[B, P]` (int32): the block that holds each page, where codes lie in blocks.
        dtype: of the states.

    Raises:
        KernelError: the range does not begin with a page, or no kernel takes the layout.
    """
    if tokens.start % PAGE_TOKENS or tokens.step != 1:
        raise KernelError(
            f"a range of pages begins at a multiple of {PAGE_TOKENS} tokens and leaves none out, "
            f"given {tokens}"
        )
    kernel: Kernel = select("decode_codes", layout, plane.codes.device).kernel
    states: torch.Tensor = kernel(plane, tokens, turns, pages, dtype)
    return states


def unreadable(layout: Layout) -> str | None:
    """Why no kernel of this contract reads a stream's codes, or None."""
    if len(layout.segments) != 1:
        return f"{len(layout.segments)} segments, one is read"
    segment = layout.segments[0]
    if segment.units != layout.heads:
        return "codes span heads"
    if segment.code_bits != 8:
        return f"codes of {segment.code_bits} bits, a byte each is read"
    return None
