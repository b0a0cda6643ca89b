"""Annealed EM: k-means with soft assignments that harden as learning goes on.

As CommVQ (arXiv 2506.18879, section 3.2) learns its key codebooks, here for free codewords.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from vqkv.codebooks.base import CodebookLearner, Health
from vqkv.codebooks.kmeans import KMeans
from vqkv.codebooks.rounds import Update, best_of_rounds
from vqkv.codebooks.statistics import Statistics
from vqkv.registry import Config

#: Responsibilities held at a time; bounds the transient `[M, n, K]` to 64 MiB.
MAX_RESPONSIBILITIES = 1 << 24


class EMConfig(Config):
    """Settings of `EM`.

    Temperatures are in mean squared errors of the start, so that they suit data of any size, and
    fall from `hot` to `cold` by equal factors.
    """

    type: Literal["em"] = "em"
    iterations: int = Field(default=20, ge=1)
    hot: float = Field(default=0.3, gt=0)
    cold: float = Field(default=0.003, gt=0)

    @model_validator(mode="after")
    def _cools(self) -> Self:
        if self.cold > self.hot:
            raise ValueError(f"`cold` is at most `hot`, given {self.cold} and {self.hot}")
        return self


class EM(CodebookLearner):
    """E: `p_ik ∝ exp(−‖x_i − c_k‖² / T)`. M: `c_k = Σ_i w_i p_ik x_i / Σ_i w_i p_ik`.

    One pass of k-means gives the start, Lloyd's update ends it, and the best codewords by hard
    assignment are kept.
    """

    Config = EMConfig
    config: EMConfig

    def _learn(
        self, samples: torch.Tensor, codewords: int, weights: torch.Tensor | None, seed: int
    ) -> tuple[torch.Tensor, list[Health]]:
        start = KMeans(iterations=1).fit(samples, codewords, weights, seed=seed).codewords_[:, 0]

        def soft(temperature: float) -> Update:
            return lambda current, _, inertia: _soft_means(
                samples, current, weights, temperature * inertia[0]
            )

        def hard(current: torch.Tensor, found: Statistics, _: list[float]) -> torch.Tensor:
            return found.means(current)

        updates = [*map(soft, temperatures(self.config)), hard]
        best, health = best_of_rounds(samples, weights, start, updates)
        return best.unsqueeze(1), [health]


def temperatures(config: EMConfig) -> list[float]:
    """From hot to cold by equal factors, one per iteration."""
    if config.iterations == 1:
        return [config.cold]
    steps = torch.linspace(0, 1, config.iterations, dtype=torch.float64)
    return [float(config.hot * (config.cold / config.hot) ** step) for step in steps]


def _soft_means(
    samples: torch.Tensor, codewords: torch.Tensor, weights: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """The M step after an E step at temperature `scale`, `[M, K, d]`."""
    sums = torch.zeros_like(codewords, dtype=torch.float64)
    mass = torch.zeros(codewords.shape[:2], dtype=torch.float64, device=samples.device)
    norms = codewords.square().sum(-1).unsqueeze(1)
    rows = max(1, MAX_RESPONSIBILITIES // (codewords.shape[0] * codewords.shape[1]))
    for start in range(0, samples.shape[0], rows):
        x = samples[start : start + rows].transpose(0, 1)  # [M, n, d]
        distances = torch.baddbmm(norms, x, codewords.transpose(1, 2), alpha=-2)
        p = torch.softmax(-distances / max(scale, 1e-30), -1)
        if weights is not None:
            p = p * weights[start : start + rows].t().unsqueeze(-1)
        sums += (p.transpose(1, 2) @ x).double()
        mass += p.sum(1).double()
    moved = (sums / mass.clamp_min(1e-30).unsqueeze(-1)).float()
    return torch.where(mass.unsqueeze(-1) > 1e-12, moved, codewords)
