"""Divide each channel by its spread over the calibration tokens."""

from __future__ import annotations

from typing import Literal

import torch

from vqkv.errors import StateError
from vqkv.rotation import Pairs
from vqkv.states import States
from vqkv.transforms.base import ChannelTransform, Metric, TransformConfig
from vqkv.transforms.roots import FLOOR
from vqkv.transforms.statistics import moments


class ChannelScaleConfig(TransformConfig):
    """Settings of `ChannelScale`.

    `sqrt_absmax` is VecInfer's smoothing (arXiv 2510.06175): it evens out half of the spread.
    `query` and `output` are the diagonals of those metrics: channels where an error costs more
    count more (TaSQ, arXiv 2610.03027).
    """

    type: Literal["channel_scale"] = "channel_scale"
    stat: Literal["std", "rms", "absmax", "sqrt_absmax", "query", "output"] = "std"


class ChannelScale(ChannelTransform):
    """`z = x / s`, s one number per channel; channels without spread keep s = 1."""

    Config = ChannelScaleConfig
    config: ChannelScaleConfig
    keeps_channels = True

    @property
    def metric(self) -> Metric | None:
        """As the stat says."""
        stat = self.config.stat
        return stat if stat == "query" or stat == "output" else None

    def fit(
        self, states: States, metric: torch.Tensor | None = None, pairs: Pairs = ()
    ) -> ChannelScale:
        """Learn s. Raises StateError where the stat is a metric and none is given."""
        if self.metric is None:
            found = moments(states)
            scale = {
                "std": found.std,
                "rms": found.rms,
                "absmax": found.absmax,
                "sqrt_absmax": found.absmax.sqrt(),
            }[self.config.stat]
        elif metric is None:
            raise StateError(f"channel_scale: stat {self.config.stat!r} needs that metric")
        else:
            cost = metric.diagonal(dim1=1, dim2=2).double()
            cost = cost / cost.mean().clamp_min(1e-30)
            scale = cost.clamp_min(FLOOR * float(cost.max())).rsqrt()
        # Below fp16's normal range a scale would round to 0 or lose its precision.
        usable = scale >= torch.finfo(torch.float16).tiny
        self._keep(torch.where(usable, scale, torch.ones_like(scale)))
        return self

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Divide."""
        return x / self.channels(), None

    def inverse(self, z: torch.Tensor, side: torch.Tensor | None) -> torch.Tensor:
        """Multiply."""
        return z * self.channels()
