"""What a peer has to do to be measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch

from vqkv.layouts import Stream


class Peer(ABC):
    """A package's own way to store keys and values, one layer's stream at a time.

    Attributes:
        rope: which keys it is given, before RoPE or after.
        learns: whether `fit` has to come first.
        name: in tables.
        package: that does the work, with its version.
    """

    rope: ClassVar[Literal["pre", "post"]]
    learns: ClassVar[bool]
    name: str
    package: str

    def fit(self, layer: int, stream: Stream, states: torch.Tensor) -> None:
        """Learn from captured states `[N, H, D]` of one stream."""
        raise NotImplementedError(f"{type(self).__name__} learns nothing")

    @abstractmethod
    def encode(self, layer: int, stream: Stream, states: torch.Tensor) -> Any:
        """What the package stores of states `[1, H, T, D]`."""

    @abstractmethod
    def decode(self, layer: int, stream: Stream, stored: Any) -> torch.Tensor:
        """States `[1, H, T, D]` of what `encode` gave."""

    @abstractmethod
    def tensors(self, stored: Any) -> list[torch.Tensor]:
        """All tensors of what `encode` gave, to count their bytes and, for the canary, to zero."""

    def side_bytes(self) -> int:
        """Bytes of codebooks: what does not grow with tokens."""
        return 0
