"""What quantizers share whose codes are chosen together, as their errors add up or cancel."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from pydantic import Field

from vqkv.codebooks.base import LEARNERS, LearnerChoice
from vqkv.codebooks.kmeans import KMeansConfig
from vqkv.errors import StateError
from vqkv.quantizers.base import QuantizerConfig
from vqkv.quantizers.codebook import CodebookQuantizer


class CoupledConfig(QuantizerConfig):
    """Settings that both kinds have."""

    code_bits: int = Field(ge=1, le=16)
    learner: LearnerChoice = KMeansConfig()
    rounds: int = Field(default=8, ge=1)
    sweeps: int = Field(default=2, ge=1)

    def bits(self) -> int:
        """`code_bits`."""
        return self.code_bits


class CoupledQuantizer(CodebookQuantizer):
    """Product codes, learned group by group and then together, where errors are coupled.

    State: `codewords`, and `coupling` in fp16 where there is one; without it they are plain product
    codes.
    """

    config: CoupledConfig
    #: Of the coupling, in words.
    form: ClassVar[str]
    coupling_: torch.Tensor

    def couple(self, metric: torch.Tensor) -> None:
        """Before `fit`: the coupling, see `Quantizer`. Raises StateError beyond fp16."""
        coupling = metric.to(torch.float16)
        if not bool(coupling.isfinite().all()):
            raise StateError(
                "the coupling reaches beyond fp16's 65504: some errors cost far more than others"
            )
        self.coupling_ = coupling

    def prepare(self, subspaces: int, dim: int) -> None:
        """Codewords are always learned: raises NotFittedError."""
        raise self.needs_fit()

    def state(self) -> dict[str, torch.Tensor]:
        """`codewords`, and `coupling` where there is one."""
        coupling = {"coupling": self.coupling_} if hasattr(self, "coupling_") else {}
        return {**super().state(), **coupling}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over `codewords` and `coupling`. Raises StateError where they do not fit."""
        rest = dict(state)
        coupling = rest.pop("coupling", None)
        super().load_state(rest)
        if coupling is None:
            return
        channels = self.codewords_.shape[0] * self.codewords_.shape[3]
        if coupling.dtype != torch.float16 or not self._fits(tuple(coupling.shape), channels):
            raise StateError(
                f"coupling is float16 {self.form} of {channels} channels, given {coupling.dtype} "
                f"{list(coupling.shape)}"
            )
        self.couple(coupling)
        self._prepare_search(self.codewords_.shape[3])

    def _fit(self, samples: torch.Tensor, weights: torch.Tensor | None, seed: int) -> None:
        learner = LEARNERS.build(self.config.learner)
        learner.fit(samples, 2**self.config.code_bits, weights, seed=seed)
        self.health_ = learner.health_
        self.keep(learner.codewords_)
        if hasattr(self, "coupling_"):
            self._prepare_search(samples.shape[2])
            books = learner.codewords_.clone()
            self._improve(samples, weights, books)
            self.keep(books)

    @abstractmethod
    def _fits(self, shape: tuple[int, ...], channels: int) -> bool:
        """Whether a coupling of this shape is one of all channels."""

    @abstractmethod
    def _improve(
        self, samples: torch.Tensor, weights: torch.Tensor | None, books: torch.Tensor
    ) -> None:
        """Learn codewords `[M, 1, K, d]` in place, in rounds."""

    def _prepare_search(self, dim: int) -> None:
        """Work out what coding subvectors of `dim` channels needs of the coupling, if anything."""
