"""Subtract each channel's mean over the calibration tokens."""

from __future__ import annotations

from typing import Literal

import torch

from vqkv.rotation import Pairs
from vqkv.states import States
from vqkv.transforms.base import ChannelTransform, TransformConfig
from vqkv.transforms.statistics import moments


class CenterConfig(TransformConfig):
    """Settings of `Center`: none."""

    type: Literal["center"] = "center"


class Center(ChannelTransform):
    """`z = x − μ`, μ the mean of each channel.

    For post-RoPE keys the mean shifts a query's scores of all coded tokens alike.
    """

    Config = CenterConfig
    keeps_metric = True
    keeps_channels = True

    def fit(self, states: States, metric: torch.Tensor | None = None, pairs: Pairs = ()) -> Center:
        """Learn μ."""
        self._keep(moments(states).mean)
        return self

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Subtract."""
        return x - self.channels(), None

    def inverse(self, z: torch.Tensor, side: torch.Tensor | None) -> torch.Tensor:
        """Add back."""
        return z + self.channels()
