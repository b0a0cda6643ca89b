"""Samples that look a little like a cache's: clusters of unequal size and spread, some far out."""

from __future__ import annotations

import torch


def mixture(samples: int, subspaces: int, dim: int, *, seed: int = 0) -> torch.Tensor:
    """`[N, M, d]` from 12 Gaussians per subspace, one sample in 50 ten times as far out."""
    generator = torch.Generator().manual_seed(seed)
    middles = 3 * torch.randn(subspaces, 12, dim, generator=generator)
    spread = 0.1 + torch.rand(subspaces, 12, 1, generator=generator)
    component = torch.rand(samples, subspaces, generator=generator).square().mul(12).long()
    subspace = torch.arange(subspaces)
    noise = torch.randn(samples, subspaces, dim, generator=generator)
    x = middles[subspace, component] + spread[subspace, component] * noise
    far = torch.rand(samples, subspaces, 1, generator=generator) < 0.02
    return torch.where(far, 10 * x, x)


def inertia(x: torch.Tensor, codewords: torch.Tensor) -> float:
    """Mean squared distance of `[N, M, d]` to the nearest of `[M, K, d]`, in fp64."""
    difference = x.double().transpose(0, 1).unsqueeze(2) - codewords.double().unsqueeze(1)
    return float(difference.square().sum(-1).amin(-1).mean())
