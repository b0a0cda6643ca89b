"""What transforms share that store a header with each run of tokens."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch.nn.functional import pad

from vqkv.errors import StateError
from vqkv.transforms.base import Transform, TransformConfig


class RunConfig(TransformConfig):
    """Settings of a `RunTransform`: tokens that share a header, a part of a page."""

    tokens: Literal[1, 2, 4, 8, 16, 32, 64] = 32


class RunTransform(Transform):
    """Stores `per_channel` numbers of each channel for each run of tokens, in fp16.

    They are a run's header. It is stored in equal parts beside the run's tokens, padded where it
    does not share out evenly, so a page has a fixed number of bytes per token and is whole once its
    last token is in.
    """

    config: RunConfig
    per_channel: ClassVar[int]

    @property
    def token_group(self) -> int:
        """Tokens of a run."""
        return self.config.tokens

    def side_count(self, heads: int, head_dim: int) -> int:
        """A token's part of the header."""
        return -(-self.per_channel * heads * head_dim // self.config.tokens)

    def _runs(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens `[N, H, D]` as `[R, tokens, C]`. Raises StateError where they end within a run."""
        if len(x) % self.config.tokens:
            raise StateError(
                f"{self.config.type} takes whole runs of {self.config.tokens} tokens, given "
                f"{len(x)} tokens"
            )
        return x.reshape(-1, self.config.tokens, x.shape[1] * x.shape[2])

    def _shared_out(self, headers: torch.Tensor) -> torch.Tensor:
        """Headers `[R, n]` as parts `[R · tokens, F]`."""
        return pad(headers, (0, -headers.shape[1] % self.config.tokens)).reshape(
            len(headers) * self.config.tokens, -1
        )

    def _headers(self, side: torch.Tensor | None, runs: torch.Tensor) -> torch.Tensor:
        """Headers `[R, 1, n]` in fp32 of runs `[R, tokens, C]`, put together again."""
        if side is None:
            raise StateError(f"{self.config.type} needs the side that forward returned, given None")
        parts = side.reshape(len(runs), 1, -1).float()
        return parts[..., : self.per_channel * runs.shape[2]]
