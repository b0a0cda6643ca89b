"""Divide each token by its own size, stored beside its codes in fp16."""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from vqkv.errors import SchemeError, StateError
from vqkv.transforms.base import Transform, TransformConfig

_TINY = torch.finfo(torch.float16).tiny


class TokenScaleConfig(TransformConfig):
    """Settings of `TokenScale`: which size, and one per head or one for all heads together.

    `group` gives each run of so many channels of a head a size of its own.
    """

    type: Literal["token_scale"] = "token_scale"
    stat: Literal["std", "rms", "l2", "minmax"] = "rms"
    scope: Literal["head", "layer"] = "head"
    group: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _within_heads(self) -> Self:
        if self.group is not None and self.scope == "layer":
            raise ValueError("groups of channels lie within heads: `group` needs scope 'head'")
        return self


class TokenScale(Transform):
    """`z = x / s(x)`, s the token's std, rms or l2 norm; std removes no mean.

    `minmax` maps the token's range onto [0, 1] and stores its low end and its width: two scalars.
    """

    Config = TokenScaleConfig
    config: TokenScaleConfig
    keeps_metric = True
    keeps_channels = True

    def check(self, heads: int, head_dim: int) -> None:
        """Refuse groups that do not fill a head."""
        if self.config.group is not None and head_dim % self.config.group:
            raise SchemeError(
                f"token_scale.group: {self.config.group} does not divide head dim {head_dim}"
            )

    @property
    def scales_heads(self) -> bool:
        """Where it is not a range, and not of a part of a head."""
        return self.config.stat != "minmax" and self.config.group is None

    def side_count(self, heads: int, head_dim: int) -> int:
        """One scalar per head, group or token, two for `minmax`."""
        scales = heads if self.config.scope == "head" else 1
        if self.config.group is not None:
            scales *= head_dim // self.config.group
        return scales * (2 if self.config.stat == "minmax" else 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Divide by the rounded scale; side is `[N, F]`.

        Raises:
            StateError: a token is too large for an fp16 scale.
        """
        rows = self._rows(x)
        if self.config.stat == "minmax":
            low, width = range_of(rows)
            z = (rows - low.float().unsqueeze(2)) / width.float().unsqueeze(2)
            return z.view_as(x), torch.cat([low, width], 1)
        size = {
            "std": lambda: rows.std(-1, correction=0),
            "rms": lambda: rows.square().mean(-1).sqrt(),
            "l2": lambda: rows.norm(dim=-1),
        }[self.config.stat]()
        # Below fp16's normal range a scale would round to 0 or lose its precision.
        size = torch.where(size >= _TINY, size, torch.ones_like(size))
        scale = _checked(size.to(torch.float16), size)
        return (rows / scale.float().unsqueeze(2)).view_as(x), scale

    def inverse(self, z: torch.Tensor, side: torch.Tensor | None) -> torch.Tensor:
        """Multiply by the stored scale."""
        if side is None:
            raise StateError("token_scale needs the side that forward returned, given None")
        rows = self._rows(z)
        if self.config.stat == "minmax":
            low, width = side.float().unsqueeze(2).chunk(2, 1)
            return (rows * width + low).view_as(z)
        return (rows * side.float().unsqueeze(2)).view_as(z)

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, R, n]`: what shares a size side by side."""
        if self.config.scope == "layer":
            return x.flatten(1).unsqueeze(1)
        return x if self.config.group is None else x.reshape(len(x), -1, self.config.group)


def range_of(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Low end and width `[N, R]` in fp16, rounded outwards so that the range covers all values."""
    least, most = rows.aminmax(dim=-1)
    low = -_rounded_up(-least)
    return low, _rounded_up((most - low.float()).clamp_min(_TINY))


def _rounded_up(exact: torch.Tensor) -> torch.Tensor:
    """The next fp16 number that is not below."""
    near = exact.to(torch.float16)
    above = torch.nextafter(near, torch.full_like(near, torch.inf))
    return _checked(torch.where(near.float() < exact, above, near), exact)


def _checked(stored: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Refuse scales that do not fit into fp16."""
    if not bool(torch.isfinite(stored).all()):
        raise StateError(
            f"a token's scale is {float(exact.abs().max()):.3g}, beyond fp16's "
            f"{torch.finfo(torch.float16).max:.0f}: scale the channels first"
        )
    return stored
