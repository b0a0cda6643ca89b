"""SimVQ: a codebook that only a linear map of it learns (arXiv 2411.02038; VQKV, 2603.16435)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from vqkv.codebooks.base import CodebookLearner, Health
from vqkv.codebooks.rounds import best_of_rounds
from vqkv.codebooks.starts import random_samples
from vqkv.codebooks.statistics import Statistics
from vqkv.registry import Config


class SimVQConfig(Config):
    """Settings of `SimVQ`; `ridge` keeps the map's system regular, in mean squares of the base."""

    type: Literal["simvq"] = "simvq"
    iterations: int = Field(default=10, ge=1)
    ridge: float = Field(default=1e-6, ge=0)


class SimVQ(CodebookLearner):
    """Codewords `q W`: minimises `Σ ‖x − q_k(x) W‖²` over W, one `[d, d]` map per codebook.

    With states that no encoder moves, the codebook and commitment terms of the published loss only
    scale the reconstruction error, so least squares takes gradient descent's place: assign, then
    `W = (Σ n_k q_kᵀ q_k)⁻¹ Σ q_kᵀ s_k`, s_k being the sum of a codeword's samples. The base q stays
    as it was drawn, from the samples, so that no codeword is far from all data. (Were it to follow
    the samples' means, the best map of means would be the identity, and this k-means.) W is folded
    in: what is kept are the mapped codewords.
    """

    Config = SimVQConfig
    config: SimVQConfig

    def _learn(
        self, samples: torch.Tensor, codewords: int, weights: torch.Tensor | None, seed: int
    ) -> tuple[torch.Tensor, list[Health]]:
        generator = torch.Generator().manual_seed(seed)
        base = random_samples(samples, codewords, weights, generator)

        def update(current: torch.Tensor, found: Statistics, _: list[float]) -> torch.Tensor:
            return self._mapped(base, found)

        best, health = best_of_rounds(samples, weights, base, [update] * self.config.iterations)
        return best.unsqueeze(1), [health]

    def _mapped(self, base: torch.Tensor, found: Statistics) -> torch.Tensor:
        q = base.double()  # [M, K, d]
        gram = q.transpose(1, 2) @ (q * found.counts.unsqueeze(2))
        cross = q.transpose(1, 2) @ found.sums
        spread = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
        eye = torch.eye(q.shape[2], dtype=q.dtype, device=q.device)
        penalty = (self.config.ridge * spread).clamp_min(1e-12)[:, None, None] * eye
        mapped: torch.Tensor = q @ torch.linalg.solve(gram + penalty, cross)
        return mapped.float()
