"""Gain-shape k-means: directions are learned on the sphere, lengths apart (GSRQ, 2607.01065).

In many dimensions the mean of a cluster is much shorter than its members. A shape is the direction
of the cluster, a gain the mean length along it.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from vqkv.codebooks.base import CodebookLearner, Health
from vqkv.codebooks.kmeans import KMeans
from vqkv.codebooks.revival import split_fullest
from vqkv.codebooks.rounds import best_of_rounds
from vqkv.codebooks.statistics import Statistics
from vqkv.registry import Config


class GainShapeConfig(Config):
    """Settings of `GainShape`.

    `shape` says what the direction is averaged from: `unit` vectors, each sample counting alike,
    or the `vector`s themselves, where long ones count more and codewords become plain means.
    """

    type: Literal["gain_shape"] = "gain_shape"
    iterations: int = Field(default=10, ge=1)
    shape: Literal["unit", "vector"] = "unit"
    revive: bool = True


class GainShape(CodebookLearner):
    """Codewords `g s`, `‖s‖ = 1`: assignment by `argmax 2 g ⟨x, s⟩ − g²`, which is the nearest.

    Update: `s = Σ w x / ‖x‖`, normalised, and `g = Σ w ⟨x, s⟩ / Σ w` over a codeword's samples. The
    start is k-means on the unit sphere, codewords as long as the subspace's samples on average.
    """

    Config = GainShapeConfig
    config: GainShapeConfig

    def _learn(
        self, samples: torch.Tensor, codewords: int, weights: torch.Tensor | None, seed: int
    ) -> tuple[torch.Tensor, list[Health]]:
        generator = torch.Generator().manual_seed(seed)
        units = torch.nn.functional.normalize(samples, dim=2)
        start = KMeans(iterations=1).fit(units, codewords, weights, seed=seed).codewords_[:, 0]
        start = torch.nn.functional.normalize(start, dim=2)
        start = start * samples.norm(dim=2).mean(0)[:, None, None]

        def update(current: torch.Tensor, found: Statistics, _: list[float]) -> torch.Tensor:
            return self._moved(samples, units, current, found, weights, generator)

        best, health = best_of_rounds(samples, weights, start, [update] * self.config.iterations)
        return best.unsqueeze(1), [health]

    def _moved(
        self,
        samples: torch.Tensor,
        units: torch.Tensor,
        current: torch.Tensor,
        found: Statistics,
        weights: torch.Tensor | None,
        generator: torch.Generator,
    ) -> torch.Tensor:
        sums = found.sums
        if self.config.shape == "unit":
            sums = _sums_by_codeword(samples, units, current, weights)
        shape = torch.nn.functional.normalize(sums, dim=2)
        gain = (found.sums * shape).sum(2) / found.counts.clamp_min(1e-30)
        moved = torch.where(
            found.dead.unsqueeze(2), current, (gain.unsqueeze(2) * shape).to(current.dtype)
        )
        if not self.config.revive or not bool(found.dead.any()):
            return moved
        error = found.inertia / found.counts.sum(1)
        return split_fullest(moved, found.counts, error, found.dead, generator)[0]


def _sums_by_codeword(
    samples: torch.Tensor,
    units: torch.Tensor,
    codewords: torch.Tensor,
    weights: torch.Tensor | None,
) -> torch.Tensor:
    """Sums `[M, K, d]` (fp64) of unit vectors by the codeword nearest to each sample."""
    from vqkv.kernels.encode import encode

    codes = encode(samples, codewords.unsqueeze(1))[..., 0].long().t()  # [M, N]
    rows = units.transpose(0, 1).double()
    if weights is not None:
        rows = rows * weights.t().unsqueeze(2)
    sums = torch.zeros_like(codewords, dtype=torch.float64)
    return sums.scatter_add_(1, codes.unsqueeze(2).expand_as(rows), rows)
