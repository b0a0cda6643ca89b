"""Repeats a learner over stages, each on what the stages before it left over."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from vqkv.codebooks.base import LEARNERS, CodebookLearner, Health, LearnerChoice
from vqkv.codebooks.kmeans import KMeansConfig
from vqkv.kernels.decode import decode
from vqkv.kernels.encode import encode
from vqkv.registry import Config


class ResidualLearnerConfig(Config):
    """Settings of `ResidualLearner`."""

    type: Literal["residual"] = "residual"
    stages: int = Field(ge=1, le=64)
    learner: LearnerChoice = KMeansConfig()


class ResidualLearner(CodebookLearner):
    """Greedy residual codebooks `[M, S, K, d]`: stage s learns from `x − Σ_{t<s} c_t`.

    Stages nest: the first R of S stages are what a fit with R stages would give. The mean error
    on the fitting samples cannot rise with stages, if each stage's learner beats the zero vector;
    a single vector's error can.
    """

    Config = ResidualLearnerConfig
    config: ResidualLearnerConfig

    def _learn(
        self, samples: torch.Tensor, codewords: int, weights: torch.Tensor | None, seed: int
    ) -> tuple[torch.Tensor, list[Health]]:
        residual = samples
        stages: list[torch.Tensor] = []
        health: list[Health] = []
        for stage in range(self.config.stages):
            learner = LEARNERS.build(self.config.learner)
            learner.fit(residual, codewords, weights, seed=seed + stage)
            stages.append(learner.codewords_)
            health += learner.health_
            residual = residual - decode(encode(residual, stages[-1]), stages[-1])
        return torch.cat(stages, 1), health
