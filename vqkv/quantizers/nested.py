"""Nested uniform codes: more stages are more digits of the same number, QuantSpec's cache.

arXiv 2502.10424: an upper half of 4 bits that a draft reads alone, a lower half that refines it.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from vqkv.errors import SchemeError
from vqkv.quantizers.base import QuantizerConfig
from vqkv.quantizers.stateless import StatelessQuantizer

#: Bits of all stages together: fp32 tells that many levels apart, with some to spare.
MOST_BITS = 16


class NestedConfig(QuantizerConfig):
    """Settings of `Nested`: `depth` stages of `code_bits` bits, for values in [0, 1]."""

    type: Literal["nested"] = "nested"
    depth: int = Field(ge=1)
    code_bits: int = Field(ge=1)

    @model_validator(mode="after")
    def _few_bits(self) -> Self:
        if self.depth * self.code_bits > MOST_BITS:
            raise ValueError(
                f"all stages together have at most {MOST_BITS} bits, given {self.depth} of "
                f"{self.code_bits}"
            )
        return self

    def stages(self, dim: int) -> int:
        """`depth`. Raises SchemeError unless `dim` is 1."""
        if dim != 1:
            raise SchemeError(f"grouping.dim: 'nested' codes single channels, given dim {dim}")
        return self.depth

    def bits(self) -> int:
        """`code_bits`, of each stage."""
        return self.code_bits

    @property
    def data_free(self) -> bool:
        """True."""
        return True


class Nested(StatelessQuantizer):
    """`x ≈ Σ_s c_s K^−s + ½ K^−S`, s from 1 to S: the digits of x in base K = 2^code_bits.

    Any first stages decode to the middle of the interval that they say, as a uniform code of so
    many bits would.
    """

    Config = NestedConfig
    config: NestedConfig
    nested = True

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes `[N, M, S]` (int32) of values `[N, M, 1]`; those beyond [0, 1] take its ends."""
        levels = 1 << self.config.depth * self.config.code_bits
        level = (x.float() * levels).floor().clamp(0, levels - 1).int()
        stages = torch.arange(self.config.depth, dtype=torch.int32, device=x.device).flip(0)
        return (level >> stages * self.config.code_bits) % (1 << self.config.code_bits)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Values `[N, M, 1]` (fp32) of codes `[N, M, s]`, s ≤ S."""
        step = 2.0 ** -(self.config.code_bits * torch.arange(1, codes.shape[2] + 1).float())
        step = step.to(codes.device)
        return (codes * step).sum(2, keepdim=True) + step[-1] / 2
