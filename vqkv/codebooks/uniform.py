"""Uniform scalar levels: the range cut into K equal steps, each coded by its middle."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator

from vqkv.codebooks.base import CodebookLearner, Health, check_samples, usage_entropy
from vqkv.errors import StateError
from vqkv.registry import Config


class UniformConfig(Config):
    """Settings of `Uniform`. With both ends given it needs no data.

    `shrink` is the part of the range found in data that levels cover, about its middle: values
    beyond are clipped, and those within come out finer.
    """

    type: Literal["uniform"] = "uniform"
    low: float | None = None
    high: float | None = None
    shrink: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _ends(self) -> UniformConfig:
        if (self.low is None) != (self.high is None):
            raise ValueError("give both `low` and `high`, or neither to take them from data")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"`low` is below `high`, given {self.low} and {self.high}")
        if self.low is not None and self.shrink != 1:
            raise ValueError("`shrink` is for ranges from data: leave it out, or `low` and `high`")
        return self


class Uniform(CodebookLearner):
    """Levels `low + (k + ½) · step`, `step = (high − low) / K`, for d = 1.

    A value in range is at most half a step from its level. Middles rather than ends halve the
    worst error at 1 bit and never make it larger.
    """

    Config = UniformConfig
    config: UniformConfig
    range_: torch.Tensor

    def fixed(self, subspaces: int, dim: int, codewords: int) -> torch.Tensor | None:
        """Levels `[M, 1, K, 1]` of the configured range, None where the range is learned."""
        if self.config.low is None or self.config.high is None:
            return None
        _check_scalar(dim)
        low = torch.full((subspaces,), self.config.low)
        return _levels(low, torch.full((subspaces,), self.config.high), codewords)

    def partial_fit(
        self,
        samples: torch.Tensor,
        codewords: int,
        weights: torch.Tensor | None = None,
        *,
        seed: int = 0,
    ) -> Uniform:
        """The range of all batches so far; health is the latest batch's. Raises as `fit`."""
        samples, weights = check_samples(samples, 1, weights)
        _check_scalar(samples.shape[2])
        low, high = samples.amin((0, 2)), samples.amax((0, 2))
        if hasattr(self, "range_"):
            low, high = torch.minimum(low, self.range_[0]), torch.maximum(high, self.range_[1])
        self.range_ = torch.stack([low, high])
        levels = self.fixed(samples.shape[1], 1, codewords)
        if levels is None:
            levels = self._levels_of(low, high, codewords)
        self.codewords_ = levels.to(samples.device)
        self.health_ = [_health(samples[..., 0], self.codewords_.view(-1, codewords), weights)]
        return self

    def _levels_of(self, low: torch.Tensor, high: torch.Tensor, codewords: int) -> torch.Tensor:
        """Levels over the part of a range that `shrink` leaves."""
        middle, reach = (low + high) / 2, self.config.shrink * (high - low) / 2
        return _levels(middle - reach, middle + reach, codewords)

    def _learn(
        self, samples: torch.Tensor, codewords: int, weights: torch.Tensor | None, seed: int
    ) -> tuple[torch.Tensor, list[Health]]:
        _check_scalar(samples.shape[2])
        levels = self.fixed(samples.shape[1], 1, codewords)
        levels = None if levels is None else levels.to(samples.device)
        if levels is None:
            levels = self._levels_of(samples.amin((0, 2)), samples.amax((0, 2)), codewords)
        return levels, [_health(samples[..., 0], levels.view(-1, codewords), weights)]


def _check_scalar(dim: int) -> None:
    if dim != 1:
        raise StateError(f"uniform levels are scalar: they need groups of dim 1, given dim {dim}")


def _levels(low: torch.Tensor, high: torch.Tensor, codewords: int) -> torch.Tensor:
    middles = (torch.arange(codewords, device=low.device) + 0.5) / codewords
    return torch.lerp(low[:, None], high[:, None], middles).view(-1, 1, codewords, 1)


def _health(x: torch.Tensor, levels: torch.Tensor, weights: torch.Tensor | None) -> Health:
    """Of samples `[N, M]` under levels `[M, K]`, ascending."""
    edges = (levels[:, 1:] + levels[:, :-1]) / 2
    nearest = torch.searchsorted(edges.contiguous(), x.t().contiguous())  # [M, N]
    weight = torch.ones_like(x.t()) if weights is None else weights.t()
    weight = weight.double()
    counts = torch.zeros(levels.shape, dtype=torch.float64, device=x.device)
    counts.scatter_add_(1, nearest, weight)
    errors = (x.t() - levels.gather(1, nearest)).double().square() * weight
    dead = int((counts == 0).sum())
    inertia = float((errors.sum(1) / weight.sum(1)).mean())
    return Health((inertia,), usage_entropy(counts), dead, dead)
