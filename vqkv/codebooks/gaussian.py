"""Fixed grids that are optimal for Gaussian coordinates: HIGGS (arXiv 2411.17525), TurboQuant.

A random rotation makes coordinates nearly Gaussian whatever the data, so no codebook has to be
learned: TurboQuant (arXiv 2504.19874) takes levels of one dimension, AQUA-KV (arXiv 2501.19392)
HIGGS grids of two and more.
"""

from __future__ import annotations

import math
from functools import cache
from importlib.resources import files
from typing import Literal

import torch
from safetensors.torch import load

from vqkv.codebooks.base import CodebookLearner, Health
from vqkv.errors import StateError
from vqkv.registry import Config

#: Fixed-point iterations for levels of one dimension; 8 bits settle to 1e-6 in fewer.
_ROUNDS = 20_000


class GaussianConfig(Config):
    """Settings of `Gaussian`: none. Coordinates are expected with mean 0 and variance 1."""

    type: Literal["gaussian"] = "gaussian"


class Gaussian(CodebookLearner):
    """MSE-optimal points for N(0, I): Lloyd–Max levels for d = 1, shipped grids for d = 2, 4, 8."""

    Config = GaussianConfig

    def fixed(self, subspaces: int, dim: int, codewords: int) -> torch.Tensor | None:
        """The grid, `[M, 1, K, d]`; the same in every subspace.

        Raises:
            StateError: there is no such grid.
        """
        return gaussian_grid(dim, codewords).expand(subspaces, 1, -1, -1)

    def _learn(
        self, samples: torch.Tensor, codewords: int, weights: torch.Tensor | None, seed: int
    ) -> tuple[torch.Tensor, list[Health]]:
        grid = gaussian_grid(samples.shape[2], codewords).to(samples.device)
        return grid.repeat(samples.shape[1], 1, 1, 1), [Health((), float("nan"), 0, 0)]


def gaussian_grid(dim: int, codewords: int) -> torch.Tensor:
    """Points `[K, d]`. Raises StateError where there is no such grid."""
    if dim == 1:
        return lloyd_max(codewords).unsqueeze(1)
    name = f"{dim}x{codewords.bit_length() - 1}"
    grids = _shipped()
    if name not in grids or len(grids[name]) != codewords:
        known = ", ".join(f"d = {n.partition('x')[0]} at {n.partition('x')[2]} bits" for n in grids)
        raise StateError(
            f"there is no Gaussian grid of {codewords} points for d = {dim}; there are {known}, "
            "and any code_bits for d = 1"
        )
    return grids[name].float()


@cache
def lloyd_max(levels: int) -> torch.Tensor:
    """Optimal levels `[K]` for N(0, 1), ascending and symmetric (Max 1960)."""
    if levels == 1:
        return torch.zeros(1)
    middles = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
    # Optimal points lie as densely as the cube root of the density says: a Gaussian of variance 3.
    points: torch.Tensor = math.sqrt(3) * torch.special.ndtri(middles)
    for _ in range(_ROUNDS):
        edges = (points[1:] + points[:-1]) / 2
        edges = torch.cat([edges.new_tensor([-torch.inf]), edges, edges.new_tensor([torch.inf])])
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        mass = torch.special.ndtr(edges[1:]) - torch.special.ndtr(edges[:-1])
        moved = (density[:-1] - density[1:]) / mass
        settled = bool((moved - points).abs().max() < 1e-9)
        points = (moved - moved.flip(0)) / 2
        if settled:
            break
    return points.float()


@cache
def _shipped() -> dict[str, torch.Tensor]:
    path = files("vqkv") / "data" / "gaussian-grids.safetensors"
    return dict(sorted(load(path.read_bytes()).items()))
