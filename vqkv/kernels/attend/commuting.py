"""Coded keys whose codewords commute with RoPE, as attention is given them; and decoding them.

Pairs of channels are complex numbers: a key at position m is `e^{imθ} g Σ_s (u_{s,a} + i u_{s,b})`,
g its token's scale (CommVQ, arXiv 2506.18879).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vqkv.kernels.pack import unpack
from vqkv.layouts import Layout


class CommutingKeys(NamedTuple):
    """Keys of n coded tokens, before RoPE. P = D / 2 pairs lie side by side in coded order.

    Attributes:
        packed: `[B, H, n, bytes]` (uint8), S codes `a · size + b` of each token and head.
        units: `[H, S, size, D]` (fp16).
        scale: `[B, H or 1, n]` (fp32), by which the sum of units is multiplied.
        turns: `[B, n, P]` (complex64), by which RoPE multiplies each pair.
        order: `[D]` (int64), the channel of a head at each coded place.
    """

    packed: torch.Tensor
    units: torch.Tensor
    scale: torch.Tensor
    turns: torch.Tensor
    order: torch.Tensor

    def indices(self) -> torch.Tensor:
        """All stages' `a`, then all `b`, `[B, H, n, 2 S]` (int32)."""
        heads, stages, size, dim = self.units.shape
        layout = Layout.of_codebook(heads, stages, size**2, dim)
        codes = unpack(self.packed, layout.segments[0].code_bits, stages, layout)
        return torch.cat([codes // size, codes % size], -1)

    def decoded(self) -> torch.Tensor:
        """Keys after RoPE, `[B, H, n, D]` in fp32, channels in the model's order."""
        sums = as_complex(summed(with_turned(self.units.float()), self.indices()))
        turned = self.scale.unsqueeze(3) * self.turns.unsqueeze(1) * sums
        keys = torch.empty(*turned.shape[:3], self.units.shape[3], device=turned.device)
        keys[..., self.order] = torch.view_as_real(turned).flatten(3)
        return keys


def with_turned(x: torch.Tensor) -> torch.Tensor:
    """Tables x `[..., S, size, D]`, then the same times i, `[..., 2 S, size, D]`."""
    return torch.cat([x, torch.view_as_real(1j * as_complex(x)).flatten(-2)], -3)


def summed(tables: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Sums over stages `[B, H, n, D]` of rows of tables `[B or none, H, S, size, D]`.

    Args:
        tables: fp32.
        indices: of rows, `[B, H, n, S]`.
    """
    size, dim = tables.shape[-2:]
    tables = tables.expand(len(indices), *tables.shape[-4:])
    batch, heads, tokens, stages = indices.shape
    first = size * torch.arange(batch * heads * stages, device=indices.device)
    rows = indices + first.view(batch, heads, 1, stages)
    sums = torch.nn.functional.embedding_bag(
        rows.view(-1, stages), tables.reshape(-1, dim), mode="sum"
    )
    return sums.view(batch, heads, tokens, dim)


def as_complex(x: torch.Tensor) -> torch.Tensor:
    """`[..., D]` with pairs side by side as complex numbers `[..., D / 2]`."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
