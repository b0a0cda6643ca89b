"""Residual quantization: stages of codewords that add up, chosen greedily.

RVQ for KV caches (arXiv 2410.15704); VQKV (arXiv 2603.16435) builds on it.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from vqkv.codebooks.base import LearnerChoice
from vqkv.codebooks.kmeans import KMeansConfig
from vqkv.codebooks.residual import ResidualLearner
from vqkv.quantizers.base import QuantizerConfig
from vqkv.quantizers.codebook import CodebookQuantizer


class ResidualConfig(QuantizerConfig):
    """Settings of `ResidualQuantizer`: `depth` stages of `code_bits` bits each."""

    type: Literal["residual"] = "residual"
    depth: int = Field(ge=1, le=64)
    code_bits: int = Field(ge=1, le=16)
    learner: LearnerChoice = KMeansConfig()

    def stages(self, dim: int) -> int:
        """`depth`, whatever the dim."""
        return self.depth

    def bits(self) -> int:
        """`code_bits`, of each stage."""
        return self.code_bits


class ResidualQuantizer(CodebookQuantizer):
    """`x ≈ Σ_s c_s`, stage s taking the codeword nearest to `x − Σ_{t<s} c_t`."""

    Config = ResidualConfig
    config: ResidualConfig

    def _fit(self, samples: torch.Tensor, weights: torch.Tensor | None, seed: int) -> None:
        learner = ResidualLearner(stages=self.config.depth, learner=self.config.learner)
        learner.fit(samples, 2**self.config.code_bits, weights, seed=seed)
        self._keep(learner.codewords_)
        self.health_ = learner.health_

    def prepare(self, subspaces: int, dim: int) -> None:
        """Residual codebooks are always learned: raises NotFittedError."""
        raise self.needs_fit()
