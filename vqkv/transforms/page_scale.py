"""Give each channel its own range over a run of tokens: KIVI's keys (arXiv 2402.02750)."""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange

from vqkv.errors import SchemeError, StateError
from vqkv.transforms.base import Transform, TransformConfig
from vqkv.transforms.token_scale import range_of


class PageScaleConfig(TransformConfig):
    """Settings of `PageScale`: tokens that share a range, a part of a page."""

    type: Literal["page_scale"] = "page_scale"
    tokens: Literal[1, 2, 4, 8, 16, 32, 64] = 32


class PageScale(Transform):
    """`z = (x − low) / width`, low and width one pair per channel and run of tokens, in fp16.

    The pairs are a run's header. It is stored in equal parts beside the run's tokens, so a page has
    a fixed number of bytes per token and is whole once its last token is in.
    """

    Config = PageScaleConfig
    config: PageScaleConfig

    @property
    def token_group(self) -> int:
        """Tokens of a run."""
        return self.config.tokens

    def check(self, heads: int, head_dim: int) -> None:
        """Refuse channels whose pairs do not share out evenly over the run's tokens."""
        scalars = 2 * heads * head_dim
        if scalars % self.config.tokens:
            raise SchemeError(
                f"page_scale.tokens: {scalars} scalars of {heads} heads of {head_dim} channels do "
                f"not share out over {self.config.tokens} tokens"
            )

    def side_count(self, heads: int, head_dim: int) -> int:
        """A token's part of the header."""
        return 2 * heads * head_dim // self.config.tokens

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map runs onto [0, 1].

        Raises:
            StateError: no whole runs, or a range beyond fp16.
        """
        runs = self._runs(x)
        low, width = range_of(rearrange(runs, "r t c -> r c t"))  # [R, C]
        z = (runs - low.float().unsqueeze(1)) / width.float().unsqueeze(1)
        header = torch.cat([low, width], 1)  # [R, 2 C]
        return z.reshape(x.shape), header.reshape(len(x), -1)

    def inverse(self, z: torch.Tensor, side: torch.Tensor | None) -> torch.Tensor:
        """Map back. Raises StateError without the side, or without whole runs."""
        if side is None:
            raise StateError("page_scale needs the side that forward returned, given None")
        runs = self._runs(z)
        low, width = side.reshape(len(runs), -1).float().chunk(2, 1)
        return (runs * width.unsqueeze(1) + low.unsqueeze(1)).reshape(z.shape)

    def _runs(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens `[N, H, D]` as `[R, tokens, C]`."""
        if len(x) % self.config.tokens:
            raise StateError(
                f"page_scale takes whole runs of {self.config.tokens} tokens, given {len(x)} tokens"
            )
        return x.reshape(-1, self.config.tokens, x.shape[1] * x.shape[2])
