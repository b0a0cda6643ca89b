"""Keep the largest channels of each token exactly, and code the rest without them: KVQuant.

arXiv 2401.18079, section 3.4. A fixed count per token, as pages need.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from vqkv.errors import SchemeError, StateError
from vqkv.transforms.base import Transform, TransformConfig

#: Channels are stored in fp16, which counts exactly up to here.
MOST_CHANNELS = 2048


class OutliersConfig(TransformConfig):
    """Settings of `Outliers`: the share of a token's channels, over all heads, to keep."""

    type: Literal["outliers"] = "outliers"
    share: float = Field(default=0.01, gt=0, lt=0.5)


class Outliers(Transform):
    """The n channels of largest size are stored as (channel, value) in fp16 and become about 0.

    What is left in them is what rounding to fp16 cut off.

    n is `share` of the C channels, rounded, and at least one.
    """

    Config = OutliersConfig
    config: OutliersConfig
    keeps_channels = True

    @property
    def head_local(self) -> bool:
        """Outliers are picked among all heads' channels together."""
        return False

    def check(self, heads: int, head_dim: int) -> None:
        """Refuse more channels than their stored numbers can tell apart."""
        if heads * head_dim > MOST_CHANNELS:
            raise SchemeError(
                f"outliers: channel numbers are stored in fp16, exact up to {MOST_CHANNELS}; "
                f"{heads} heads of {head_dim} channels have {heads * head_dim}"
            )

    def side_count(self, heads: int, head_dim: int) -> int:
        """Channel and value of each outlier."""
        return 2 * self._count(heads * head_dim)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take outliers out. Raises StateError on values beyond fp16."""
        flat = x.flatten(1)
        channels = flat.abs().topk(self._count(flat.shape[1]), 1).indices.sort(1).values
        values = flat.gather(1, channels).to(torch.float16)
        if not bool(torch.isfinite(values).all()):
            raise StateError(
                f"an outlier is {float(flat.abs().max()):.3g}, beyond fp16's 65504: scale the "
                "channels first"
            )
        z = flat.scatter_add(1, channels, -values.to(flat.dtype))
        return z.view_as(x), torch.cat([channels.to(torch.float16), values], 1)

    def inverse(self, z: torch.Tensor, side: torch.Tensor | None) -> torch.Tensor:
        """Put outliers back. Raises StateError without the side."""
        if side is None:
            raise StateError("outliers needs the side that forward returned, given None")
        channels, values = side.chunk(2, 1)
        flat = z.flatten(1)
        return flat.scatter_add(1, channels.long(), values.to(flat.dtype)).view_as(z)

    def _count(self, channels: int) -> int:
        return max(1, round(self.config.share * channels))
