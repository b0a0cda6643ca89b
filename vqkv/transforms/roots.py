"""Square roots of metrics: the maps after which a cost is squared error."""

from __future__ import annotations

import torch

#: Costs in a metric are raised to this part of the largest, so that it can be inverted.
FLOOR = 1e-4


def roots(metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`W = M^{1/2}` of metrics `[..., n, n]`, floored, and its inverse: `eᵀ M e = ‖W e‖²`."""
    values, vectors = torch.linalg.eigh(metric)
    root = values.clamp_min(FLOOR * values[..., -1:]).clamp_min(1e-30).sqrt().unsqueeze(-2)
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


def normed(metric: torch.Tensor) -> torch.Tensor:
    """Metrics `[V, n, n]` at mean eigenvalue 1, so that codewords keep the states' scale."""
    return metric / metric.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp_min(1e-30)
