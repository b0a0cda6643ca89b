"""RoPE pairs as lengths and angles: PolarQuant (arXiv 2502.00527)."""

from __future__ import annotations

from typing import Literal, Self

import torch

from vqkv.errors import SchemeError
from vqkv.rotation import Pairs, rope_pairs
from vqkv.transforms.base import Transform, TransformConfig


class PolarConfig(TransformConfig):
    """Settings of `Polar`: none."""

    type: Literal["polar"] = "polar"


class Polar(Transform):
    """A pair (x, y) becomes (ρ, φ): `x = ρ cos φ`, `y = ρ sin φ`, φ from −π to π.

    Channels that do not rotate (partial rotary) stay as they are. A stream without RoPE is paired
    as half-split RoPE would.
    """

    Config = PolarConfig
    config: PolarConfig
    pairs: Pairs = ()

    def for_pairs(self, pairs: Pairs) -> Self:
        """Take these pairs."""
        self.pairs = pairs
        return self

    def check(self, heads: int, head_dim: int) -> None:
        """Refuse channels that do not come in pairs."""
        if not self.pairs and head_dim % 2:
            raise SchemeError(f"polar: takes channels in pairs, given head dim {head_dim}")

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Lengths in the place of a pair's first channel, angles in that of its second."""
        first, second = self._channels(x)
        z = x.clone()
        z[..., first] = torch.hypot(x[..., first], x[..., second])
        z[..., second] = torch.atan2(x[..., second], x[..., first])
        return z, None

    def inverse(self, z: torch.Tensor, side: torch.Tensor | None) -> torch.Tensor:
        """Back to channels."""
        first, second = self._channels(z)
        x = z.clone()
        x[..., first] = z[..., first] * z[..., second].cos()
        x[..., second] = z[..., first] * z[..., second].sin()
        return x

    def _channels(self, x: torch.Tensor) -> torch.Tensor:
        """The first channel of each pair, and the second: `[2, P]`."""
        pairs = self.pairs or rope_pairs("half", x.shape[2])
        return torch.tensor(pairs, device=x.device).t()
