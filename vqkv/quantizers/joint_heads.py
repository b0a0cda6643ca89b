"""Product codes of a layer's heads that are chosen together: errors of heads add up or cancel."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from vqkv.codebooks.assignment import step_for
from vqkv.codebooks.base import LEARNERS, LearnerChoice
from vqkv.codebooks.kmeans import KMeansConfig
from vqkv.errors import StateError
from vqkv.kernels.decode import decode
from vqkv.kernels.encode import encode
from vqkv.quantizers.base import QuantizerConfig
from vqkv.quantizers.codebook import CodebookQuantizer


class JointHeadsConfig(QuantizerConfig):
    """Settings of `JointHeadsQuantizer`.

    Attributes:
        code_bits: of each code.
        learner: of the codewords that learning starts from, group by group.
        rounds: of learning, over all heads.
        sweeps: of choosing each head's codes, when encoding.
    """

    type: Literal["joint_heads"] = "joint_heads"
    code_bits: int = Field(ge=1, le=16)
    learner: LearnerChoice = KMeansConfig()
    rounds: int = Field(default=4, ge=1)
    sweeps: int = Field(default=2, ge=1)

    def bits(self) -> int:
        """`code_bits`."""
        return self.code_bits

    @property
    def couples(self) -> Literal["heads"]:
        """Always heads."""
        return "heads"


class JointHeadsQuantizer(CodebookQuantizer):
    """Codes that minimise `eᵀ M e` over all channels of a token, `M_hh = c_h I` for each head h.

    Alone, a head's best codes are the nearest codewords. What errors of the other heads do to it
    moves what they are to be near to: a sweep goes through the heads and codes, each in one search,

        x_h − Σ_{g≠h} e_g M_gh / c_h

    which is best as the others are; learning also moves codewords to the means of these targets.
    Neither can raise the error. Reading is that of a product code, head by head.

    State: `codewords`, and `coupling` `[H, n, H, n]` in fp16, `M_gh / c_h` of the n channels of
    heads g and h, where errors of heads were coupled.
    """

    Config = JointHeadsConfig
    config: JointHeadsConfig
    coupling_: torch.Tensor

    def couple(self, metric: torch.Tensor) -> None:
        """Before `fit`: `M_gh / c_h`, `[H, n, H, n]`."""
        self.coupling_ = metric.to(torch.float16)

    def prepare(self, subspaces: int, dim: int) -> None:
        """Codewords are always learned: raises NotFittedError."""
        raise self.needs_fit()

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes `[N, M, 1]` (int32). Raises NotFittedError, or StateError on another shape."""
        if not hasattr(self, "coupling_"):
            return super().encode(x)
        x, books = self._checked(x), self._codewords()
        codes = x.new_zeros(*x.shape[:2], 1, dtype=torch.int32)
        errors = torch.zeros_like(x)
        for _ in range(self.config.sweeps):
            for head in self._heads(len(books)):
                target = self._target(x, errors, head)
                codes[:, head] = encode(target, books[head])
                errors[:, head] = decode(codes[:, head], books[head]) - x[:, head]
        return codes

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
        heads, width = coupling.shape[:2] if coupling.ndim == 4 else (0, 0)
        fits = heads * width == channels and coupling.shape[2:] == (heads, width)
        if not fits or coupling.dtype != torch.float16:
            raise StateError(
                f"coupling is float16 [H, n, H, n] of {channels} channels, given {coupling.dtype} "
                f"{list(coupling.shape)}"
            )
        self.coupling_ = coupling

    def _fit(self, samples: torch.Tensor, weights: torch.Tensor | None, seed: int) -> None:
        learner = LEARNERS.build(self.config.learner)
        learner.fit(samples, 2**self.config.code_bits, weights, seed=seed)
        self.health_ = learner.health_
        self.keep(learner.codewords_)
        if hasattr(self, "coupling_"):
            self._improve(samples, weights)

    def _improve(self, samples: torch.Tensor, weights: torch.Tensor | None) -> None:
        """Move codewords, in rounds over all heads."""
        step = step_for("auto", samples.device)
        books = self.codewords_.float()
        errors = decode(self.encode(samples), books) - samples
        for _ in range(self.config.rounds):
            for head in self._heads(len(books)):
                target = self._target(samples, errors, head)
                own = weights if weights is None or weights.ndim == 1 else weights[:, head]
                found = step(target, books[head, 0], own).all_reduced()
                books[head, 0] = found.means(books[head, 0])
                codes = encode(target, books[head])
                errors[:, head] = decode(codes, books[head]) - samples[:, head]
        self.keep(books)

    def _heads(self, subspaces: int) -> list[slice]:
        """The subvectors of each head."""
        groups = subspaces // len(self.coupling_)
        return [slice(first, first + groups) for first in range(0, subspaces, groups)]

    def _target(self, x: torch.Tensor, errors: torch.Tensor, head: slice) -> torch.Tensor:
        """What the codewords of a head are to be near to, `[N, M / H, d]`."""
        groups = head.stop - head.start
        columns = self.coupling_[:, :, head.start // groups].flatten(0, 1).float()  # [C, n]
        pushed = errors.flatten(1) @ columns  # by the other heads: a head's own block is 0
        return (x[:, head] - pushed.view(len(x), groups, -1)).contiguous()
