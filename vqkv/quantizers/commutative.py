"""Residual codes of keys whose codewords commute with RoPE: CommVQ (arXiv 2506.18879).

A RoPE pair of channels is a complex number, which RoPE multiplies by `e^{imθ}`. A codeword gives a
pair `u_a + i u_b`: the sum of two of `size` complex numbers, the second turned by a right angle.
Multiplications commute, so codes can be summed first and rotated once, or queries be rotated and
multiplied with codewords.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field

from vqkv.codebooks.base import Health, usage_entropy
from vqkv.codebooks.em import EMConfig, temperatures
from vqkv.errors import SchemeError, StateError
from vqkv.quantizers.base import Quantizer, QuantizerConfig

#: Scores held at a time; bounds the transient `[M, n, K]` to 64 MiB.
MAX_SCORES = 1 << 24


class CommutativeConfig(QuantizerConfig):
    """Settings of `Commutative`: as many stages as fit into `rate` bits per channel.

    A stage's code has two indices of `size` units each. `em` says how a stage is learned; every
    fourth stage starts ten times cooler, as in the paper.
    """

    type: Literal["rope_commutative"] = "rope_commutative"
    rate: float = Field(gt=0, le=16)
    size: Literal[4, 8, 16, 32, 64, 128, 256] = 64
    em: EMConfig = EMConfig(iterations=8)

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
        """Codes `[N, M, S]` (int32), greedy over stages.

        Raises:
            NotFittedError: before fit.
            StateError: `x` does not have the units' M and d.
        """
        units = self._units()
        if x.ndim != 3 or x.shape[1:] != (units.shape[0], units.shape[3]):
            raise StateError(
                f"vectors have shape [N, {units.shape[0]}, {units.shape[3]}], given {list(x.shape)}"
            )
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
        stages = zip(codes.unbind(-1), units.float().unbind(1), strict=True)
        return torch.stack([codeword(code, stage) for code, stage in stages]).sum(0)

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
        for index in range(self.config.stages(samples.shape[2])):
            cooler = 10.0 ** -(index // 4)
            units, health = _learn_stage(residual, weights, self.config, cooler, generator)
            rounded = units.half()
            if not bool(torch.isfinite(rounded).all()):
                raise StateError(
                    f"units reach {float(units.abs().max()):.3g}, beyond fp16's 65504: scale the "
                    "states with a token_scale transform"
                )
            stages.append(rounded)
            self.health_.append(health)
            stage = rounded.float()
            residual = residual - codeword(nearest(residual, stage), stage)
        self.units_ = torch.stack(stages, 1)


def turned(x: torch.Tensor) -> torch.Tensor:
    """`i x`: pairs (x, y) of neighbouring channels become (−y, x)."""
    pairs = x.unflatten(-1, (-1, 2))
    return torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)


def codeword(codes: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """`u_a + i u_b` `[N, M, d]` of codes `[N, M]` under units `[M, size, d]`."""
    first, second = codes.long() // units.shape[1], codes.long() % units.shape[1]
    subspace = torch.arange(units.shape[0], device=units.device)
    return units[subspace, first] + turned(units)[subspace, second]


def nearest(x: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """Codes `[N, M]` (int32) of the nearest `u_a + i u_b`, the lowest among equals."""
    codes = [scores.flatten(2).argmin(2).t() for scores in _scores(x, units)]
    return torch.cat(codes).int() if codes else x.new_zeros(0, units.shape[0], dtype=torch.int32)


def scores(query: torch.Tensor, codes: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """Complex products of a query with the codes' sums: what rotation by position still multiplies.

    `⟨q, R_m k⟩ = Re Σ_j conj(q_j) e^{imθ_j} k_j`: a table of `conj(q_j) u_j` for every unit, then a
    sum of look-ups, then one rotation per token and pair.

    Args:
        query: `[d]`, pairs of neighbouring channels.
        codes: `[N, S]` of one subspace.
        units: `[S, size, d]`.

    Returns:
        `conj(q_j) Σ_s k_{s,j}`, complex `[N, d / 2]`.
    """
    q = torch.view_as_complex(query.float().unflatten(-1, (-1, 2)).contiguous())
    u = torch.view_as_complex(units.float().unflatten(-1, (-1, 2)).contiguous())
    table = q.conj() * u  # [S, size, d / 2]
    stage = torch.arange(len(units), device=units.device)
    first, second = codes.long() // units.shape[1], codes.long() % units.shape[1]
    return (table[stage, first] + 1j * table[stage, second]).sum(1)


def _scores(x: torch.Tensor, units: torch.Tensor) -> Iterator[torch.Tensor]:
    """`‖u_a + i u_b‖² − 2⟨x, u_a + i u_b⟩` `[M, n, size, size]`, some rows at a time.

    Scores of both halves add up, so that `size²` codewords cost `2 size` products.
    """
    right = turned(units)
    norms = units.square().sum(-1)
    sizes = norms.unsqueeze(2) + norms.unsqueeze(1) + 2 * units @ right.transpose(1, 2)
    rows = max(1, MAX_SCORES // sizes.numel())
    for part in x.split(rows):
        block = part.transpose(0, 1)
        first = -2 * block @ units.transpose(1, 2)
        second = -2 * block @ right.transpose(1, 2)
        yield first.unsqueeze(3) + second.unsqueeze(2) + sizes.unsqueeze(1)


def _learn_stage(
    x: torch.Tensor,
    weights: torch.Tensor,
    config: CommutativeConfig,
    cooler: float,
    generator: torch.Generator,
) -> tuple[torch.Tensor, Health]:
    """Units `[M, size, d]` of one stage, by annealed EM; the best by hard assignment are kept."""
    drawn = torch.randperm(len(x), generator=generator)[: config.size].to(x.device)
    # u_a + i u_b is a sample when both are about half of it turned back by 45 degrees.
    units = (x[drawn].transpose(0, 1) - turned(x[drawn].transpose(0, 1))) / 2
    inertia: list[float] = []
    best, least = units, float("inf")
    for temperature in [*temperatures(config.em), 0.0]:
        found = hard_error(x, units, weights)
        inertia.append(found)
        if found < least:
            best, least = units, found
        units = m_step(*e_step(x, units, weights, temperature * cooler * inertia[0]), units)
    found = hard_error(x, units, weights)
    if found < least:
        best, least = units, found
    codes = nearest(x, best)
    counts = torch.zeros(best.shape[0], config.size**2, dtype=torch.float64)
    used = codes.t().long().cpu()
    counts.scatter_add_(1, used, torch.ones_like(used, dtype=torch.float64))
    # Sums of pairs are not learned one by one, so unused ones are not dead.
    return best, Health((*inertia, least), usage_entropy(counts), 0, 0)


def hard_error(x: torch.Tensor, units: torch.Tensor, weights: torch.Tensor) -> float:
    """Mean squared distance to the nearest codeword, over all subspaces."""
    errors = (x - codeword(nearest(x, units), units)).square().sum(-1).double()
    return float(((errors * weights).sum(0) / weights.sum(0)).mean())


def e_step(
    x: torch.Tensor, units: torch.Tensor, weights: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mass `[M, size, size]` of each codeword and sums `[M, size, size, d]` of its samples.

    Sums are kept over a and over b alone, which is all that the M step needs: the second return is
    `Σ_b` and `−i Σ_a` of them, added up, `[M, size, d]`. At temperature 0 assignment is hard.
    """
    size = units.shape[1]
    mass = x.new_zeros(units.shape[0], size, size, dtype=torch.float64)
    sums = torch.zeros_like(units, dtype=torch.float64)
    start = 0
    for scores_ in _scores(x, units):
        rows = scores_.shape[1]
        flat = scores_.flatten(2)
        if temperature:
            p = torch.softmax(-flat / temperature, -1)
        else:
            p = torch.zeros_like(flat).scatter_(2, flat.argmin(2, keepdim=True), 1.0)
        p = p * weights[start : start + rows].t().unsqueeze(-1).float()
        block = x[start : start + rows].transpose(0, 1)
        shared = p.unflatten(2, (size, size))
        mass += shared.sum(1).double()
        first, second = shared.sum(3), shared.sum(2)
        sums += (first.transpose(1, 2) @ block - turned(second.transpose(1, 2) @ block)).double()
        start += rows
    return mass, sums


def m_step(mass: torch.Tensor, sums: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """The units that minimise `Σ_ab S_ab |m_ab − u_a − i u_b|²`; no mass leaves a unit as it was.

    Normal equations, alike for every pair: `(diag(r + q) + i (S − Sᵀ)) u = Σ_b s_ab − i Σ_a s_ab`,
    r and q the row and column sums of S.
    """
    rows = mass.sum(2) + mass.sum(1)
    matrix = torch.complex(torch.diag_embed(rows), mass - mass.transpose(1, 2))
    # Keeps units without mass in place, and the system regular.
    slack = 1e-9 * rows.mean(1).clamp_min(1e-30)
    eye = torch.eye(mass.shape[1], dtype=matrix.dtype, device=matrix.device)
    old = torch.view_as_complex(units.double().unflatten(-1, (-1, 2)).contiguous())
    right = torch.view_as_complex(sums.unflatten(-1, (-1, 2)).contiguous())
    solved = torch.linalg.solve(
        matrix + slack[:, None, None] * eye, right + slack[:, None, None] * old
    )
    return torch.view_as_real(solved).flatten(-2).float()


def _weights(samples: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    if weights is None:
        return samples.new_ones(samples.shape[:2], dtype=torch.float64)
    wide = weights.unsqueeze(1) if weights.ndim == 1 else weights
    return wide.expand(samples.shape[:2]).double()
