"""No quantization: each value's own bits are its codes. The exact end of every comparison."""

from __future__ import annotations

from typing import Literal

import torch

from vqkv.quantizers.base import QuantizerConfig
from vqkv.quantizers.stateless import StatelessQuantizer

#: 16-bit words of a value, and the type that holds it.
_WORDS = {"float32": 2, "float16": 1, "bfloat16": 1}


class IdentityConfig(QuantizerConfig):
    """Settings of `IdentityQuantizer`. float32 keeps the states of every model exactly."""

    type: Literal["identity"] = "identity"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    def stages(self, dim: int) -> int:
        """One code per 16-bit word of the subvector."""
        return dim * _WORDS[self.dtype]

    def bits(self) -> int:
        """16."""
        return 16

    @property
    def data_free(self) -> bool:
        """True."""
        return True


class IdentityQuantizer(StatelessQuantizer):
    """Stores values of the configured type as their 16-bit words."""

    Config = IdentityConfig
    config: IdentityConfig

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes `[N, M, d · words]` (int32, 0..65535) of vectors `[N, M, d]`."""
        stored = x.to(getattr(torch, self.config.dtype)).contiguous()
        return stored.view(torch.int16).to(torch.int32) & 0xFFFF

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Vectors `[N, M, d]` (fp32)."""
        words = codes.to(torch.int16).contiguous()
        return words.view(getattr(torch, self.config.dtype)).float()
