"""The simplest learner: codewords are samples drawn at random."""

from __future__ import annotations

from typing import Literal

import torch

from vqkv.codebooks import CodebookLearner, Health
from vqkv.registry import Config


class RandomSamplesConfig(Config):
    """Settings of `RandomSamples`: none."""

    type: Literal["random_samples"] = "random_samples"


class RandomSamples(CodebookLearner):
    """Draws K samples per subspace, the likelier the more they weigh."""

    Config = RandomSamplesConfig

    def _learn(
        self, samples: torch.Tensor, codewords: int, weights: torch.Tensor | None, seed: int
    ) -> tuple[torch.Tensor, list[Health]]:
        generator = torch.Generator().manual_seed(seed)
        chances = torch.ones(samples.shape[:2]) if weights is None else weights
        drawn = torch.multinomial(
            chances.t().contiguous(), codewords, generator=generator
        )  # [M, K]
        subspace = torch.arange(samples.shape[1])[:, None]
        books = samples.transpose(0, 1)[subspace, drawn]  # [M, K, d]
        distances = torch.cdist(samples.transpose(0, 1), books).amin(-1).square()
        health = Health((float(distances.mean()),), float("nan"), 0, 0)
        return books.unsqueeze(1), [health]
