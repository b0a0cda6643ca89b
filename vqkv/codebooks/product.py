"""Several learners side by side: each run of subspaces has its own."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from vqkv.codebooks.base import LEARNERS, CodebookLearner, Health, LearnerChoice
from vqkv.errors import StateError
from vqkv.registry import Config


class ProductLearnerConfig(Config):
    """Settings of `ProductLearner`: one learner per equal run of subspaces, in order."""

    type: Literal["product"] = "product"
    learners: tuple[LearnerChoice, ...] = Field(min_length=1)


class ProductLearner(CodebookLearner):
    """Splits the M subspaces into equal contiguous runs and gives each run its own learner."""

    Config = ProductLearnerConfig
    config: ProductLearnerConfig

    def _learn(
        self, samples: torch.Tensor, codewords: int, weights: torch.Tensor | None, seed: int
    ) -> tuple[torch.Tensor, list[Health]]:
        runs = len(self.config.learners)
        if samples.shape[1] % runs:
            raise StateError(
                f"{runs} learners share subspaces equally, given {samples.shape[1]} subspaces"
            )
        weight_runs = [None] * runs if weights is None else list(weights.chunk(runs, 1))
        parts: list[torch.Tensor] = []
        health: list[Health] = []
        for config, run, weight in zip(
            self.config.learners, samples.chunk(runs, 1), weight_runs, strict=True
        ):
            learner = LEARNERS.build(config).fit(run, codewords, weight, seed=seed)
            parts.append(learner.codewords_)
            health += learner.health_
        stages = [part.shape[1] for part in parts]
        if len(set(stages)) > 1:
            raise StateError(f"learners side by side give equally many stages, given {stages}")
        return torch.cat(parts), health

    def fixed(self, subspaces: int, dim: int, codewords: int) -> torch.Tensor | None:
        """Codewords `[M, 1, K, d]` if every run's learner has them without data."""
        run = subspaces // len(self.config.learners)
        parts = [LEARNERS.build(c).fixed(run, dim, codewords) for c in self.config.learners]
        return None if any(part is None for part in parts) else torch.cat(parts)
