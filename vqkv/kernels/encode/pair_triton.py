"""Keys and values in one launch on a GPU, codes written as bytes."""

from __future__ import annotations

import torch

from vqkv.kernels.encode import triton
from vqkv.kernels.encode.pair import Pair
from vqkv.kernels.select import Kernel
from vqkv.layouts import Layout


def encode_pair(
    keys: torch.Tensor,
    key_codewords: torch.Tensor,
    values: torch.Tensor,
    value_codewords: torch.Tensor,
) -> Pair:
    """Codes `[N, M, S]` (uint8) of each."""
    from vqkv.kernels.gpu import encode_ops

    codes: Pair = encode_ops.encode_pair(keys, key_codewords, values, value_codewords)
    return codes


def refuses(layouts: tuple[Layout, Layout], device: torch.device) -> str | None:
    """What the kernel of one stream refuses of either."""
    keys, values = (triton.refuses(layout, device) for layout in layouts)
    return keys or values


KERNEL = Kernel("encode_pair", "triton", encode_pair, refuses, 100, only_asked_for_on=("cpu",))
