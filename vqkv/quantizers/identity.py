"""No quantization: each value's own bits are its codes. The exact end of every comparison."""

from __future__ import annotations

from typing import Literal

import torch

from vqkv.errors import StateError
from vqkv.quantizers.base import Quantizer, QuantizerConfig

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


class IdentityQuantizer(Quantizer):
    """Stores values of the configured type as their 16-bit words."""

    Config = IdentityConfig
    config: IdentityConfig

    def _fit(self, samples: torch.Tensor, weights: torch.Tensor | None, seed: int) -> None:
        self.health_ = []

    def prepare(self, subspaces: int, dim: int) -> None:
        """Nothing to set up."""
        self.health_ = []

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes `[N, M, d · words]` (int32, 0..65535) of vectors `[N, M, d]`."""
        stored = x.to(getattr(torch, self.config.dtype)).contiguous()
        return stored.view(torch.int16).to(torch.int32) & 0xFFFF

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Vectors `[N, M, d]` (fp32)."""
        words = codes.to(torch.int16).contiguous()
        return words.view(getattr(torch, self.config.dtype)).float()

    def planned_bytes(self, subspaces: int, dim: int) -> int:
        """0."""
        return 0

    def state(self) -> dict[str, torch.Tensor]:
        """Empty: nothing is learned."""
        return {}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Raises StateError where there is anything to load."""
        if state:
            raise StateError(f"identity has no state, given {sorted(state)}")
