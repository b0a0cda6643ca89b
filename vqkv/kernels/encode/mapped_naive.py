"""States to bytes by whichever kernels encode vectors, after a product with the maps."""

from __future__ import annotations

import torch

from vqkv.kernels.encode import encode
from vqkv.kernels.encode.joint import Coupling, encode_joint
from vqkv.kernels.encode.mapped import Maps
from vqkv.kernels.select import Kernel, anywhere


def encode_mapped(
    x: torch.Tensor,
    source: torch.Tensor | None,
    maps: Maps,
    codewords: torch.Tensor,
    coupled: Coupling | None,
    sweeps: int,
    width: int,
) -> torch.Tensor:
    """Codes `[N, H, M / H]` (uint8)."""
    heads, dim = len(maps.mean), codewords.shape[3]
    vectors = maps(x, source).flatten(1).unflatten(1, (-1, dim)).contiguous()
    if coupled is None:
        codes = encode(vectors, codewords)
    else:
        codes = encode_joint(vectors, codewords, coupled, sweeps, width)
    return codes.to(torch.uint8).view(len(x), heads, -1)


KERNEL = Kernel("encode_mapped", "naive", encode_mapped, anywhere, speed=0)
