"""Several learners side by side: each run of subspaces has its own."""

from __future__ import annotations

from collections.abc import Iterator
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
    learners_: list[CodebookLearner]

    def _learn(
        self, samples: torch.Tensor, codewords: int, weights: torch.Tensor | None, seed: int
    ) -> tuple[torch.Tensor, list[Health]]:
        learners = [LEARNERS.build(config) for config in self.config.learners]
        for learner, run, weight in self._runs(learners, samples, weights):
            learner.fit(run, codewords, weight, seed=seed)
        return _joined(learners)

    def partial_fit(
        self,
        samples: torch.Tensor,
        codewords: int,
        weights: torch.Tensor | None = None,
        *,
        seed: int = 0,
    ) -> ProductLearner:
        """Each run's learner takes one step.

        Raises:
            StateError: as `fit`, or a run's learner does not stream.
        """
        samples, weights = check_samples(samples, 1, weights)
        if not hasattr(self, "learners_"):
            self.learners_ = [LEARNERS.build(config) for config in self.config.learners]
        for learner, run, weight in self._runs(self.learners_, samples, weights):
            learner.partial_fit(run, codewords, weight, seed=seed)
        self.codewords_, self.health_ = _joined(self.learners_)
        return self

    def _runs(
        self,
        learners: list[CodebookLearner],
        samples: torch.Tensor,
        weights: torch.Tensor | None,
    ) -> Iterator[tuple[CodebookLearner, torch.Tensor, torch.Tensor | None]]:
        """Each learner with its samples and weights."""
        runs = len(learners)
        if samples.shape[1] % runs:
            raise StateError(
                f"{runs} learners share subspaces equally, given {samples.shape[1]} subspaces"
            )
        weight_runs = [None] * runs if weights is None else list(weights.chunk(runs, 1))
        yield from zip(learners, samples.chunk(runs, 1), weight_runs, strict=True)

    def fixed(self, subspaces: int, dim: int, codewords: int) -> torch.Tensor | None:
        """Codewords `[M, 1, K, d]` if every run's learner has them without data."""
        run = subspaces // len(self.config.learners)
        parts = [LEARNERS.build(c).fixed(run, dim, codewords) for c in self.config.learners]
        return None if any(part is None for part in parts) else torch.cat(parts)


def _joined(learners: list[CodebookLearner]) -> tuple[torch.Tensor, list[Health]]:
    """Codewords and health of all runs."""
    stages = [learner.codewords_.shape[1] for learner in learners]
    if len(set(stages)) > 1:
        raise StateError(f"learners side by side give equally many stages, given {stages}")
    codewords = torch.cat([learner.codewords_ for learner in learners])
    return codewords, [stage for learner in learners for stage in learner.health_]
