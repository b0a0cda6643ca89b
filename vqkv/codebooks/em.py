"""Annealed EM: k-means with soft assignments that harden as learning goes on.

As CommVQ (arXiv 2506.18879, section 3.2) learns its key codebooks, here for free codewords.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from vqkv.codebooks.assignment import step_for
from vqkv.codebooks.base import CodebookLearner, Health, usage_entropy
from vqkv.codebooks.kmeans import KMeans
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
        step = step_for("auto", samples.device)
        current = KMeans(iterations=1).fit(samples, codewords, weights, seed=seed).codewords_[:, 0]
        inertia: list[float] = []
        dead = 0
        best, least = current, float("inf")
        for temperature in [*temperatures(self.config), 0.0]:
            found = step(samples, current, weights)
            inertia.append(found.mean_inertia)
            dead += int(found.dead.sum())
            if inertia[-1] < least:
                best, least = current, inertia[-1]
            if temperature:
                scale = temperature * inertia[0]
                current = _soft_means(samples, current, weights, scale)
            else:
                current = found.means(current)
        last = step(samples, current, weights)
        if last.mean_inertia < least:
            best = current
        final = step(samples, best, weights)
        health = Health(
            inertia=(*inertia, final.mean_inertia),
            entropy=usage_entropy(final.counts),
            dead_before=dead,
            dead_after=int(final.dead.sum()),
        )
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
