"""Beam search by the compiled CPU kernel."""

from __future__ import annotations

import torch

from vqkv.kernels import native
from vqkv.kernels.native.beam import encode_beam, product_bytes
from vqkv.kernels.select import Kernel
from vqkv.layouts import Layout

#: Of the table of products of codewords with each other, for one codebook.
MAX_PRODUCT_BYTES = 64 * 2**20


def refuses(layout: Layout, device: torch.device) -> str | None:
    """It runs on CPUs, with a C compiler, while products of codewords are few enough to keep."""
    (segment,) = layout.segments
    if product_bytes(segment.stages, segment.codewords) > MAX_PRODUCT_BYTES:
        return (
            f"products of {segment.stages} stages of {segment.codewords} codewords with each "
            f"other take more than {MAX_PRODUCT_BYTES >> 20} MiB"
        )
    return native.refusal(device)


KERNEL = Kernel("encode_beam", "cpu", encode_beam, refuses, speed=10)
