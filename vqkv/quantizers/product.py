"""Product quantization: each subvector has a codebook, its code the nearest codeword.

Jégou, Douze, Schmid (2011); for KV caches CQ (arXiv 2405.03917). Scalar quantization is dim 1.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from vqkv.codebooks.base import LEARNERS, LearnerChoice
from vqkv.codebooks.kmeans import KMeansConfig
from vqkv.errors import StateError
from vqkv.quantizers.base import QuantizerConfig
from vqkv.quantizers.codebook import CodebookQuantizer


class ProductConfig(QuantizerConfig):
    """Settings of `ProductQuantizer`. Zero bits keep one codeword, the mean, and store nothing."""

    type: Literal["product"] = "product"
    code_bits: int = Field(ge=0, le=16)
    learner: LearnerChoice = KMeansConfig()

    def bits(self) -> int:
        """`code_bits`."""
        return self.code_bits

    @property
    def data_free(self) -> bool:
        """True where the learner's codewords are fixed, as with a uniform grid."""
        return LEARNERS.build(self.learner).fixed(1, 1, 2) is not None


class ProductQuantizer(CodebookQuantizer):
    """One codebook per subvector, one code each: `code = argmin_k ‖x − c_k‖²`."""

    Config = ProductConfig
    config: ProductConfig

    def _fit(self, samples: torch.Tensor, weights: torch.Tensor | None, seed: int) -> None:
        learner = LEARNERS.build(self.config.learner)
        learner.fit(samples, 2**self.config.code_bits, weights, seed=seed)
        self.keep(learner.codewords_)
        self.health_ = learner.health_

    def prepare(self, subspaces: int, dim: int) -> None:
        """Take the learner's fixed codewords.

        Raises:
            NotFittedError: it has none.
            StateError: it has none for M subspaces.
        """
        fixed = LEARNERS.build(self.config.learner).fixed(subspaces, dim, 2**self.config.code_bits)
        if fixed is None:
            raise self.needs_fit()
        if fixed.shape[0] != subspaces:
            raise StateError(
                f"learner {self.config.learner.type!r} has fixed codewords for "  # type: ignore[attr-defined]
                f"{fixed.shape[0]} subspaces, needed are {subspaces}: learners side by side share "
                "subspaces equally"
            )
        self.keep(fixed)
        self.health_ = []
