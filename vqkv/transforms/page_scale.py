"""Give each channel its own range over a run of tokens: KIVI's keys (arXiv 2402.02750)."""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange

from vqkv.transforms.runs import RunConfig, RunTransform
from vqkv.transforms.token_scale import range_of


class PageScaleConfig(RunConfig):
    """Settings of `PageScale`: tokens that share a range, a part of a page."""

    type: Literal["page_scale"] = "page_scale"


class PageScale(RunTransform):
    """`z = (x − low) / width`, low and width one pair per channel and run of tokens, in fp16."""

    Config = PageScaleConfig
    config: PageScaleConfig
    per_channel = 2

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map runs onto [0, 1].

        Raises:
            StateError: no whole runs, or a range beyond fp16.
        """
        runs = self._runs(x)
        low, width = range_of(rearrange(runs, "r t c -> r c t"))  # [R, C]
        z = (runs - low.float().unsqueeze(1)) / width.float().unsqueeze(1)
        return z.reshape(x.shape), self._shared_out(torch.cat([low, width], 1))

    def inverse(self, z: torch.Tensor, side: torch.Tensor | None) -> torch.Tensor:
        """Map back. Raises StateError without the side, or without whole runs."""
        runs = self._runs(z)
        low, width = self._headers(side, runs).chunk(2, 2)
        return (runs * width + low).reshape(z.shape)
