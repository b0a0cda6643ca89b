"""Repeats a learner over stages, each on what the stages before it left over."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from vqkv.codebooks.base import (
    LEARNERS,
    CodebookLearner,
    Health,
    LearnerChoice,
    check_samples,
)
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
    learners_: list[CodebookLearner]

    def _learn(
        self, samples: torch.Tensor, codewords: int, weights: torch.Tensor | None, seed: int
    ) -> tuple[torch.Tensor, list[Health]]:
        learners = [LEARNERS.build(self.config.learner) for _ in range(self.config.stages)]
        residual = samples
        for stage, learner in enumerate(learners):
            learner.fit(residual, codewords, weights, seed=seed + stage)
            residual = _left_over(residual, learner)
        return _joined(learners)

    def partial_fit(
        self,
        samples: torch.Tensor,
        codewords: int,
        weights: torch.Tensor | None = None,
        *,
        seed: int = 0,
    ) -> ResidualLearner:
        """Each stage takes one step on what the stages before it, moved already, leave over.

        Raises:
            StateError: as `fit`, or the stages' learner does not stream.
        """
        samples, weights = check_samples(samples, 1, weights)
        if not hasattr(self, "learners_"):
            self.learners_ = [
                LEARNERS.build(self.config.learner) for _ in range(self.config.stages)
            ]
        residual = samples
        for stage, learner in enumerate(self.learners_):
            learner.partial_fit(residual, codewords, weights, seed=seed + stage)
            residual = _left_over(residual, learner)
        self.codewords_, self.health_ = _joined(self.learners_)
        return self


def _left_over(x: torch.Tensor, learner: CodebookLearner) -> torch.Tensor:
    return x - decode(encode(x, learner.codewords_), learner.codewords_)


def _joined(learners: list[CodebookLearner]) -> tuple[torch.Tensor, list[Health]]:
    """Codewords and health of all stages."""
    codewords = torch.cat([learner.codewords_ for learner in learners], 1)
    return codewords, [stage for learner in learners for stage in learner.health_]
