"""States of one stream, read in chunks so that memory does not grow with tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

CHUNK_TOKENS = 8192


@dataclass(frozen=True)
class States:
    """Keys or values of one layer: `tokens` of them, in chunks `[n, H, D]` (fp32).

    `chunks` starts afresh at each call.
    """

    tokens: int
    chunks: Callable[[], Iterator[torch.Tensor]]

    @classmethod
    def of(cls, x: torch.Tensor) -> States:
        """States that are already in memory, `[N, H, D]`."""
        return cls(x.shape[0], lambda: (chunk.float() for chunk in x.split(CHUNK_TOKENS)))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> States:
        """The same tokens with a function applied to each chunk as it is read."""
        return States(self.tokens, lambda: (function(chunk) for chunk in self.chunks()))

    def beside(
        self,
        others: Sequence[States],
        function: Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor],
    ) -> Iterator[torch.Tensor]:
        """`function(chunk, [chunk of each other])`, chunk by chunk; all hold the same tokens."""
        for x, *rest in zip(self.chunks(), *(other.chunks() for other in others), strict=True):
            yield function(x, rest)

    def sample(self, count: int, seed: int) -> torch.Tensor:
        """At most `count` tokens drawn at random without repeats, in order: `[n, H, D]`."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(self.tokens, generator=generator)[:count].sort().values
        picked = []
        start = 0
        for chunk in self.chunks():
            inside = drawn[(drawn >= start) & (drawn < start + chunk.shape[0])] - start
            picked.append(chunk[inside.to(chunk.device)])
            start += chunk.shape[0]
        return torch.cat(picked)
