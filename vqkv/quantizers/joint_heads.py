"""Product codes of a layer's heads that are chosen together: errors of heads add up or cancel."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from vqkv.codebooks.assignment import step_for
from vqkv.kernels.decode import decode
from vqkv.kernels.encode import encode
from vqkv.kernels.encode.heads import encode_heads, head_by_head, target
from vqkv.quantizers.coupled import CoupledConfig, CoupledQuantizer


class JointHeadsConfig(CoupledConfig):
    """Settings of `JointHeadsQuantizer`.

    Attributes:
        code_bits: of each code.
        learner: of the codewords that learning starts from, group by group.
        rounds: of learning, over all heads.
        sweeps: of choosing each head's codes, when encoding.
        most_heads: that are chosen together, as a coupling of all would grow with their square.
    """

    type: Literal["joint_heads"] = "joint_heads"
    rounds: int = Field(default=4, ge=1)
    most_heads: int = Field(default=8, ge=1)

    @property
    def couples(self) -> Literal["heads"]:
        """Always heads."""
        return "heads"

    def coupled_heads(self, heads: int) -> int:
        """The largest number up to `most_heads` that divides H."""
        return max(h for h in range(1, min(heads, self.most_heads) + 1) if heads % h == 0)


class JointHeadsQuantizer(CoupledQuantizer):
    """Codes that minimise `eᵀ M e` over channels of several heads, `M_hh = c_h I` for each head h.

    Alone, a head's best codes are the nearest codewords. What errors of the other heads do to it
    moves what they are to be near to: a sweep goes through the heads and codes each, by one search,
    with codewords near to

        x_h − Σ_{g≠h} e_g M_gh / c_h

    which is best as the others are, so that no sweep raises the error. Learning also moves
    codewords to the means of these targets. Reading is that of a product code, head by head.

    State: `codewords`, and `coupling` `[B, h, n, h, n]` in fp16, `M_gh / c_h` of the n channels of
    heads g and h in each set of h heads, where errors of heads were coupled.
    """

    Config = JointHeadsConfig
    config: JointHeadsConfig
    form = "[B, h, n, h, n]"

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes `[N, M, 1]` (int32). Raises NotFittedError, or StateError on another shape."""
        if not hasattr(self, "coupling_"):
            return super().encode(x)
        return encode_heads(self._checked(x), self._codewords(), self.coupling_, self.config.sweeps)

    def _fits(self, shape: tuple[int, ...], channels: int) -> bool:
        sets, heads, width = shape[:3] if len(shape) == 5 else (0, 0, 0)
        return sets * heads * width == channels and shape[3:] == (heads, width)

    def _improve(
        self, samples: torch.Tensor, weights: torch.Tensor | None, books: torch.Tensor
    ) -> None:
        step = step_for("auto", samples.device)
        books.copy_(self.codewords_)  # as codes are chosen by them
        errors = decode(self.encode(samples), books) - samples
        for _ in range(self.config.rounds):
            for own, columns in head_by_head(self.coupling_, len(books)):
                wanted = target(samples, errors, own, columns)
                weight = weights if weights is None or weights.ndim == 1 else weights[:, own]
                found = step(wanted, books[own, 0], weight).all_reduced()
                books[own, 0] = found.means(books[own, 0])
                errors[:, own] = decode(encode(wanted, books[own]), books[own]) - samples[:, own]
