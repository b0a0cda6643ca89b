"""Signs of random projections: QJL (arXiv 2406.03482)."""

from __future__ import annotations

import math
from functools import cache
from typing import Literal

import torch
from pydantic import Field

from vqkv.errors import SchemeError
from vqkv.quantizers.base import QuantizerConfig
from vqkv.quantizers.stateless import StatelessQuantizer


class SignSketchConfig(QuantizerConfig):
    """Settings of `SignSketch`: `rate` signs per channel, and the seed of the projections."""

    type: Literal["sign_sketch"] = "sign_sketch"
    rate: float = Field(gt=0, le=8)
    seed: int = Field(default=0, ge=0)

    def stages(self, dim: int) -> int:
        """`rate · d` signs. Raises SchemeError where that is no whole number."""
        signs = self.rate * dim
        if abs(signs - round(signs)) > 1e-9:
            raise SchemeError(
                f"quantizer.rate: {self.rate:g} signs for each of {dim} channels are {signs:g}, "
                "which is no whole number"
            )
        return round(signs)

    def bits(self) -> int:
        """1."""
        return 1

    @property
    def data_free(self) -> bool:
        """True."""
        return True


class SignSketch(StatelessQuantizer):
    """`sign(S x)`, S Gaussian `[m, d]`, decoded as `√(π/2) / m · Sᵀ sign(S x)`.

    For unit vectors x the inner product of any q with what is decoded is unbiased (QJL, Lemma 3.2):
    scale tokens by their l2 norm before. S follows from the seed and is not stored.
    """

    Config = SignSketchConfig
    config: SignSketchConfig

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes `[N, M, m]`, 1 for projections that are not negative."""
        projections = _projections(x.shape[2], self.config.stages(x.shape[2]), self.config.seed)
        return (x.float() @ projections.to(x.device).t() >= 0).int()

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Vectors `[N, M, d]` (fp32)."""
        signs = 2 * codes.float() - 1
        dim = round(codes.shape[2] / self.config.rate)
        projections = _projections(dim, codes.shape[2], self.config.seed).to(codes.device)
        return math.sqrt(math.pi / 2) / codes.shape[2] * (signs @ projections)


@cache
def _projections(dim: int, signs: int, seed: int) -> torch.Tensor:
    return torch.randn(signs, dim, generator=torch.Generator().manual_seed(seed))
