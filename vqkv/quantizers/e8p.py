"""The E8P grid, 8 channels in 16 bits: QuIP# (arXiv 2402.04396, section 4.2), a HIGGS grid.

AQUA-KV (arXiv 2501.19392) offers it beside grids of fewer dimensions.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Literal

import torch

from vqkv.errors import SchemeError
from vqkv.quantizers.base import QuantizerConfig
from vqkv.quantizers.stateless import StatelessQuantizer

DIM = 8

#: Absolute patterns, and of them those that pad the shells of |D̂8| up to 256: see `_patterns`.
PATTERNS, PADDING = 256, 29

#: What the grid is multiplied by for the least error on N(0, I), by line search; QuIP#'s 1 / 1.03.
SCALE = 0.97

#: Scores held at a time; transients of a few MiB stay in a processor's cache.
MAX_SCORES = 1 << 20


class E8PConfig(QuantizerConfig):
    """Settings of `E8P`: none. Channels are expected with mean 0 and variance 1."""

    type: Literal["e8p"] = "e8p"

    def stages(self, dim: int) -> int:
        """1. Raises SchemeError unless `dim` is 8."""
        if dim != DIM:
            raise SchemeError(f"grouping.dim: 'e8p' codes {DIM} channels together, given {dim}")
        return 1

    def bits(self) -> int:
        """16."""
        return 16

    @property
    def data_free(self) -> bool:
        """True."""
        return True


class E8P(StatelessQuantizer):
    """`x ≈ s (σ ∘ a + t)`: a pattern a, signs σ and a shift t of all channels by ¼ or −¼.

    Patterns are half-integers, 256 of the shortest absolute values of D̂8 = {v ∈ (ℤ + ½)⁸ : Σ v
    even}. Flipping a sign changes the parity of Σ v, so seven signs settle the eighth: 8 bits of
    pattern, 7 of signs, 1 of shift. All points lie in E8 + ¼. The scale s is the best for Gaussian
    channels.
    """

    Config = E8PConfig
    config: E8PConfig

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes `[N, M, 1]` (int32) of the points nearest to `x` `[N, M, 8]`."""
        rows = x.float().reshape(-1, DIM)
        codes = [_nearest(part / SCALE) for part in rows.split(MAX_SCORES // PATTERNS)]
        return torch.cat(codes).view(*x.shape[:2], 1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Vectors `[N, M, 8]` (fp32)."""
        return SCALE * _points(codes[..., 0])


def _nearest(x: torch.Tensor) -> torch.Tensor:
    """Codes `[n]` (int32) of the unscaled points nearest to `x` `[n, 8]`: the better shift's."""
    scored = [_nearest_shifted(x - shift, index) for index, shift in enumerate((-0.25, 0.25))]
    (below, low), (above, high) = scored
    return torch.where(high < low, above, below)


def _nearest_shifted(y: torch.Tensor, shift: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes `[n]` of the nearest `σ ∘ a` to `y` `[n, 8]`, and squared distances `[n]`.

    The best signs are those of y. Where they have the wrong parity, the pattern's cheapest channel
    is flipped: `‖y − σ ∘ a‖² = ‖y‖² − 2⟨|y|, a⟩ + ‖a‖² + 4 min_i |y_i| a_i`.
    """
    patterns, odd = _patterns(y.device)
    size = y.abs()
    negative = y < 0
    wrong = (negative.sum(1) % 2).bool().unsqueeze(1) != odd  # [n, P]
    costs = torch.addmm(patterns.square().sum(1), size, patterns.t(), alpha=-2)
    flip = size[:, :1] * patterns[:, 0]
    for channel in range(1, DIM):
        flip = torch.minimum(flip, size[:, channel, None] * patterns[:, channel])
    least, pattern = torch.where(wrong, costs + 4 * flip, costs).min(1)
    flipped = (size * patterns[pattern]).argmin(1)
    cheapest = torch.nn.functional.one_hot(flipped, DIM).bool()
    negative = negative ^ (cheapest & wrong.gather(1, pattern.unsqueeze(1)))
    places = 2 ** torch.arange(DIM - 1, device=y.device)
    signs = (negative[:, 1:] * places).sum(1)
    codes = (pattern << DIM) | (signs << 1) | shift
    return codes.int(), least + y.square().sum(1)


def _points(codes: torch.Tensor) -> torch.Tensor:
    """Unscaled points `[..., 8]` (fp32) of codes `[...]`."""
    patterns, odd = _patterns(codes.device)
    codes = codes.long()
    pattern = codes >> DIM
    negative = (codes.unsqueeze(-1) >> torch.arange(1, DIM, device=codes.device)) & 1
    first = (negative.sum(-1, keepdim=True) + odd[pattern].unsqueeze(-1)) % 2
    signs = 1 - 2 * torch.cat([first, negative], -1)
    return signs * patterns[pattern] + 0.5 * (codes.unsqueeze(-1) & 1) - 0.25


@cache
def _patterns(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Patterns `[P, 8]`, and of each whether its signs hold an odd number of minuses, `[P]`.

    All 227 patterns with ‖a‖² ≤ 10, and of those with ‖a‖² = 12 the first 29 with five 3/2 and
    three ½, in lexicographic order. The paper takes 29 others, which are as long.
    """
    every = torch.tensor(list(product((0.5, 1.5, 2.5), repeat=DIM)))
    norms = every.square().sum(1)
    padding = every[(norms == 12) & (every.amax(1) == 1.5)][:PADDING]
    patterns = torch.cat([every[norms <= 10], padding]).to(device)
    return patterns, patterns.sum(1) % 2 == 1
