"""Product codes of a layer's heads that are chosen together: errors of heads add up or cancel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field

from vqkv.codebooks.assignment import step_for
from vqkv.kernels.decode import decode
from vqkv.kernels.encode import encode
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
        x, books = self._checked(x), self._codewords()
        codes = x.new_zeros(*x.shape[:2], 1, dtype=torch.int32)
        errors = torch.zeros_like(x)
        for _ in range(self.config.sweeps):
            for own, columns in self._heads(len(books)):
                found = encode(_target(x, errors, own, columns), books[own])
                codes[:, own] = found
                errors[:, own] = decode(found, books[own]) - x[:, own]
        return codes

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
            for own, columns in self._heads(len(books)):
                target = _target(samples, errors, own, columns)
                weight = weights if weights is None or weights.ndim == 1 else weights[:, own]
                found = step(target, books[own, 0], weight).all_reduced()
                books[own, 0] = found.means(books[own, 0])
                errors[:, own] = decode(encode(target, books[own]), books[own]) - samples[:, own]

    def _heads(self, subspaces: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Of the first head of every set, the second and so on: subvectors, `[B · M / H]`, and what
        heads of the set push them by, `[B, h n, n]`."""
        sets, heads = self.coupling_.shape[:2]
        places = torch.arange(subspaces, device=self.coupling_.device).view(sets, heads, -1)
        for head in range(heads):
            columns = self.coupling_[:, :, :, head].flatten(1, 2)
            yield places[:, head].flatten(), columns.float()


def _target(
    x: torch.Tensor, errors: torch.Tensor, own: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """What codewords of a head of each set are to be near to, `[N, B · M / H, d]`."""
    by_set = errors.reshape(len(x), *columns.shape[:2])
    # By the other heads of the set: a head's own block is 0.
    pushed = torch.einsum("nbi,bij->nbj", by_set, columns)
    return x[:, own] - pushed.reshape(len(x), len(own), -1)
