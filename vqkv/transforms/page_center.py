"""Subtract each channel's mean over a run of tokens: the shift of NSNQuant (arXiv 2505.18231)."""

from __future__ import annotations

from typing import Literal

import torch

from vqkv.errors import StateError
from vqkv.transforms.runs import RunConfig, RunTransform


class PageCenterConfig(RunConfig):
    """Settings of `PageCenter`: tokens that share a mean, a part of a page."""

    type: Literal["page_center"] = "page_center"


class PageCenter(RunTransform):
    """`z = x − m`, m the mean of a channel over a run of tokens, in fp16."""

    Config = PageCenterConfig
    config: PageCenterConfig
    keeps_channels = True
    keeps_metric = True
    per_channel = 1

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Subtract the rounded mean.

        Raises:
            StateError: no whole runs, or a mean beyond fp16.
        """
        runs = self._runs(x)
        mean = runs.mean(1).to(torch.float16)  # [R, C]
        if not bool(torch.isfinite(mean).all()):
            raise StateError(
                f"page_center: a channel's mean is beyond fp16's 65504, values reach "
                f"{float(x.abs().max()):.3g}: scale the channels first"
            )
        z = runs - mean.float().unsqueeze(1)
        return z.reshape(x.shape), self._shared_out(mean)

    def inverse(self, z: torch.Tensor, side: torch.Tensor | None) -> torch.Tensor:
        """Add back. Raises StateError without the side, or without whole runs."""
        runs = self._runs(z)
        return (runs + self._headers(side, runs)).reshape(z.shape)
