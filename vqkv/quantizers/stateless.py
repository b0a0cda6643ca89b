"""What quantizers that learn nothing share: no fit, no state, no side bytes."""

from __future__ import annotations

import torch

from vqkv.errors import StateError
from vqkv.quantizers.base import Quantizer


class StatelessQuantizer(Quantizer):
    """A quantizer that its settings say all about."""

    def _fit(self, samples: torch.Tensor, weights: torch.Tensor | None, seed: int) -> None:
        self.health_ = []

    def prepare(self, subspaces: int, dim: int) -> None:
        """Nothing to set up."""
        self.health_ = []

    def planned_bytes(self, subspaces: int, dim: int) -> int:
        """0."""
        return 0

    def state(self) -> dict[str, torch.Tensor]:
        """Empty: nothing is learned."""
        return {}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Raises StateError where there is anything to load."""
        if state:
            raise StateError(f"{type(self).__name__} has no state, given {sorted(state)}")
