"""Residual quantization: stages of codewords that add up, chosen greedily.

RVQ for KV caches (arXiv 2410.15704); VQKV (arXiv 2603.16435) builds on it.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from vqkv.codebooks.base import LearnerChoice
from vqkv.codebooks.kmeans import KMeansConfig
from vqkv.codebooks.residual import ResidualLearner
from vqkv.errors import SchemeError
from vqkv.quantizers.base import QuantizerConfig
from vqkv.quantizers.codebook import CodebookQuantizer
from vqkv.quantizers.search import beam_search, refine

#: As many as `ResidualLearner` learns.
MAX_STAGES = 64


class ResidualConfig(QuantizerConfig):
    """Settings of `ResidualQuantizer`: stages of `code_bits` bits each.

    Their number is the `depth`, or follows from a `rate` in bits per channel. Codes are chosen
    greedily; `beam` candidates per vector and `refine` rounds of choosing each stage anew cost
    time and find better ones.
    """

    type: Literal["residual"] = "residual"
    depth: int | None = Field(default=None, ge=1, le=MAX_STAGES)
    rate: float | None = Field(default=None, gt=0, le=16)
    code_bits: int = Field(ge=1, le=16)
    learner: LearnerChoice = KMeansConfig()
    beam: int = Field(default=1, ge=1, le=64)
    refine: int = Field(default=0, ge=0, le=16)

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.depth is None) == (self.rate is None):
            raise ValueError(
                "give either `depth`, in stages, or `rate`, in bits per channel; given "
                f"{'neither' if self.depth is None else 'both'}"
            )
        return self

    def stages(self, dim: int) -> int:
        """`depth`, or `rate · d / code_bits`. Raises SchemeError where that gives no stages."""
        if self.depth is not None:
            return self.depth
        assert self.rate is not None  # `_one_of` has seen to it
        stages = self.rate * dim / self.code_bits
        if abs(stages - round(stages)) > 1e-9 or not 1 <= round(stages) <= MAX_STAGES:
            step = self.code_bits / dim
            raise SchemeError(
                f"quantizer.rate: {self.rate:g} bits for each of {dim} channels are {stages:g} "
                f"stages of {self.code_bits} bits; give a multiple of {step:g} up to "
                f"{MAX_STAGES * step:g}"
            )
        return round(stages)

    def bits(self) -> int:
        """`code_bits`, of each stage."""
        return self.code_bits


class ResidualQuantizer(CodebookQuantizer):
    """`x ≈ Σ_s c_s`, stage s taking the codeword nearest to `x − Σ_{t<s} c_t`."""

    Config = ResidualConfig
    config: ResidualConfig
    nested = True

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes `[N, M, S]` (int32), by the search that is configured."""
        if self.config.beam == 1 and not self.config.refine:
            return super().encode(x)
        greedy = super().encode(x)  # checks the shape too
        books = self._codewords()
        codes = greedy if self.config.beam == 1 else beam_search(x.float(), books, self.config.beam)
        return refine(x.float(), books, codes, self.config.refine) if self.config.refine else codes

    def _fit(self, samples: torch.Tensor, weights: torch.Tensor | None, seed: int) -> None:
        stages = self.config.stages(samples.shape[2])
        learner = ResidualLearner(stages=stages, learner=self.config.learner)
        learner.fit(samples, 2**self.config.code_bits, weights, seed=seed)
        self.keep(learner.codewords_)
        self.health_ = learner.health_

    def prepare(self, subspaces: int, dim: int) -> None:
        """Residual codebooks are always learned: raises NotFittedError."""
        raise self.needs_fit()
