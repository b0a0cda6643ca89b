"""Residual codes of keys whose codewords commute with RoPE: CommVQ (arXiv 2506.18879).

A RoPE pair of channels is a complex number, which RoPE multiplies by `e^{imθ}`. A codeword gives a
pair `u_a + i u_b`: the sum of two of `size` complex numbers, the second turned by a right angle.
Multiplications commute, so codes can be summed first and rotated once, or queries be rotated and
multiplied with codewords.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field

from vqkv.codebooks.commuting import addends, codeword, learn_stage, nearest
from vqkv.codebooks.em import EMConfig
from vqkv.errors import SchemeError, StateError
from vqkv.kernels.decode import decode
from vqkv.quantizers.base import Quantizer, QuantizerConfig
from vqkv.quantizers.search import beam_search


class CommutativeConfig(QuantizerConfig):
    """Settings of `Commutative`: as many stages as fit into `rate` bits per channel.

    A stage's code has two indices of `size` units each. A stage is learned by the soft iterations
    of `em`, each on `draw` samples of its own, then `hard` ones on all samples. Codes are chosen
    greedily, stage by stage, or with a `beam` of partial sums, index by index.
    """

    type: Literal["rope_commutative"] = "rope_commutative"
    rate: float = Field(gt=0, le=16)
    size: Literal[4, 8, 16, 32, 64, 128, 256] = 64
    em: EMConfig = EMConfig(iterations=8, hot=0.05, cold=0.01)
    draw: int = Field(default=4096, ge=1)
    hard: int = Field(default=2, ge=1)
    beam: int = Field(default=1, ge=1, le=64)

    def stages(self, dim: int) -> int:
        """`⌊rate · d / bits⌋`. Raises SchemeError where that is none."""
        stages = math.floor(self.rate * dim / self.bits() + 1e-9)
        if dim % 2:
            raise SchemeError(f"quantizer: RoPE pairs make an even dim, given {dim}")
        if stages < 1:
            raise SchemeError(
                f"quantizer.rate: {self.rate:g} bits for each of {dim} channels leave no room for "
                f"a code of {self.bits()} bits; give at least {self.bits() / dim:g}"
            )
        return stages

    def bits(self) -> int:
        """Of two indices."""
        return 2 * (self.size.bit_length() - 1)

    def least_samples(self) -> int:
        """One for each unit."""
        return self.size

    @property
    def needs_rope_pairs(self) -> bool:
        """True."""
        return True

    @property
    def commutes(self) -> bool:
        """True."""
        return True


class Commutative(Quantizer):
    """`x ≈ Σ_s u_{s,a_s} + i u_{s,b_s}`, pairs of neighbouring channels being complex numbers.

    State: `units` `[M, S, size, d]` in fp16. A code is `a · size + b`.
    """

    Config = CommutativeConfig
    config: CommutativeConfig
    units_: torch.Tensor

    def prepare(self, subspaces: int, dim: int) -> None:
        """Units are always learned: raises NotFittedError."""
        raise self.needs_fit()

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes `[N, M, S]` (int32), by the search that is configured.

        Raises:
            NotFittedError: before fit.
            StateError: `x` does not have the units' M and d.
        """
        units = self._units()
        if x.ndim != 3 or x.shape[1:] != (units.shape[0], units.shape[3]):
            raise StateError(
                f"vectors have shape [N, {units.shape[0]}, {units.shape[3]}], given {list(x.shape)}"
            )
        if self.config.beam > 1:
            indices = beam_search(x.float(), addends(units), self.config.beam)
            return indices[..., 0::2] * self.config.size + indices[..., 1::2]
        residual, codes = x.float(), []
        for stage in units.float().unbind(1):
            codes.append(nearest(residual, stage))
            residual = residual - codeword(codes[-1], stage)
        return torch.stack(codes, -1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Vectors `[N, M, d]` (fp32). Raises NotFittedError, or StateError on a wrong shape."""
        units = self._units()
        if codes.ndim != 3 or codes.shape[1:] != units.shape[:2]:
            raise StateError(
                f"codes have shape [N, {units.shape[0]}, {units.shape[1]}], "
                f"given {list(codes.shape)}"
            )
        size = self.config.size
        return decode(torch.stack([codes // size, codes % size], -1).flatten(-2), addends(units))

    def planned_bytes(self, subspaces: int, dim: int) -> int:
        """Units in fp16."""
        return 2 * subspaces * self.config.stages(dim) * self.config.size * dim

    def state(self) -> dict[str, torch.Tensor]:
        """`units` `[M, S, size, d]` in fp16."""
        return {"units": self._units()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over `units`. Raises StateError on another name, rank, type or size."""
        units = state.get("units")
        if (
            set(state) != {"units"}
            or units is None
            or units.dtype != torch.float16
            or units.ndim != 4
            or units.shape[1:3] != (self.config.stages(units.shape[3]), self.config.size)
        ):
            given = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in state.items()}
            raise StateError(
                f"state holds 'units', float16 [M, S, {self.config.size}, d]; given {given}"
            )
        self.units_ = units

    def _units(self) -> torch.Tensor:
        if not hasattr(self, "units_"):
            raise self.needs_fit()
        return self.units_

    def _fit(self, samples: torch.Tensor, weights: torch.Tensor | None, seed: int) -> None:
        if samples.shape[0] < self.config.size:
            raise StateError(
                f"{self.config.size} units need at least as many samples, given "
                f"{samples.shape[0]}: calibrate on more tokens"
            )
        weights = _weights(samples, weights)
        generator = torch.Generator().manual_seed(seed)
        residual, stages = samples, []
        self.health_ = []
        config = self.config
        for _ in range(config.stages(samples.shape[2])):
            units, codes, health = learn_stage(
                residual,
                weights,
                config.size,
                config.em,
                draw=config.draw,
                hard=config.hard,
                generator=generator,
            )
            rounded = units.half()
            if not bool(torch.isfinite(rounded).all()):
                raise StateError(
                    f"units reach {float(units.abs().max()):.3g}, beyond fp16's 65504: scale the "
                    "states with a token_scale transform"
                )
            stages.append(rounded)
            self.health_.append(health)
            residual = residual - codeword(codes, rounded.float())
        self.units_ = torch.stack(stages, 1)


def _weights(samples: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    if weights is None:
        return samples.new_ones(samples.shape[:2], dtype=torch.float64)
    wide = weights.unsqueeze(1) if weights.ndim == 1 else weights
    return wide.expand(samples.shape[:2]).double()
