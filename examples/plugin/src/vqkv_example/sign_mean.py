"""One bit per channel: its sign, around the mean that each side of zero has."""

from __future__ import annotations

from typing import Literal

import torch

from vqkv.errors import StateError
from vqkv.quantizers import Quantizer, QuantizerConfig


class SignMeanConfig(QuantizerConfig):
    """Settings of `SignMeanQuantizer`: none."""

    type: Literal["sign_mean"] = "sign_mean"

    def stages(self, dim: int) -> int:
        """One code per channel."""
        return dim

    def bits(self) -> int:
        """1."""
        return 1


class SignMeanQuantizer(Quantizer):
    """Stores signs; decodes to the mean of all samples of that sign, per channel."""

    Config = SignMeanConfig
    levels_: torch.Tensor  # [M, d, 2]: the means below and above zero

    def _fit(self, samples: torch.Tensor, weights: torch.Tensor | None, seed: int) -> None:
        counts = torch.ones(samples.shape[:2]) if weights is None else weights.float()
        counts = counts.reshape(len(samples), -1, 1)
        sides = [samples.clamp(max=0), samples.clamp(min=0)]
        shares = [counts * (samples < 0), counts * (samples >= 0)]
        means = [
            (side * counts).sum(0) / share.sum(0).clamp_min(1e-12)
            for side, share in zip(sides, shares, strict=True)
        ]
        self.levels_ = torch.stack(means, -1).to(torch.float16)
        self.health_ = []

    def prepare(self, subspaces: int, dim: int) -> None:
        """It always learns."""
        raise self.needs_fit()

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes `[N, M, d]`: 1 where a channel is not negative."""
        self._levels()
        return (x >= 0).to(torch.int32)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Vectors `[N, M, d]`."""
        below, above = self._levels().float().unbind(-1)
        return torch.where(codes.bool(), above, below)

    def planned_bytes(self, subspaces: int, dim: int) -> int:
        """Two fp16 levels per channel."""
        return 4 * subspaces * dim

    def state(self) -> dict[str, torch.Tensor]:
        """`levels` `[M, d, 2]`."""
        return {"levels": self._levels()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over `levels`."""
        if set(state) != {"levels"}:
            raise StateError(f"state holds 'levels' alone, given {sorted(state)}")
        self.levels_ = state["levels"]

    def _levels(self) -> torch.Tensor:
        if not hasattr(self, "levels_"):
            raise self.needs_fit()
        return self.levels_
