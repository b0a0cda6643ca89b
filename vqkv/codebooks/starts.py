"""Where k-means starts: K of the samples."""

from __future__ import annotations

import torch

#: k-means++ sees this many samples, or 4 per codeword where that is more.
PLUS_PLUS_SAMPLES = 4096


def random_samples(
    x: torch.Tensor, codewords: int, weights: torch.Tensor | None, generator: torch.Generator
) -> torch.Tensor:
    """K different samples per subspace, `[M, K, d]`, drawn in proportion to their weights."""
    return _take(x, _draw(x, codewords, weights, generator).to(x.device))


def plus_plus(
    x: torch.Tensor, codewords: int, weights: torch.Tensor | None, generator: torch.Generator
) -> torch.Tensor:
    """k-means++ (Arthur, Vassilvitskii 2007) on a random part of the samples, `[M, K, d]`.

    Each next codeword is a sample drawn in proportion to its weight times the squared distance to
    the codewords before it.
    """
    count = min(x.shape[0], max(PLUS_PLUS_SAMPLES, 4 * codewords))
    used = None if weights is None else (weights > 0).float()
    drawn = _draw(x, count, used, generator).to(x.device)  # [M, n]
    part = _take(x, drawn)
    weight = torch.ones_like(part[..., 0]) if weights is None else weights.t().gather(1, drawn)
    weight = weight.double()
    part = part - part.mean(1, keepdim=True)  # keeps the products below from cancelling
    channels = part.transpose(1, 2).contiguous()  # [M, d, n]
    norms = channels.square().sum(1, keepdim=True)  # [M, 1, n]
    uniform = torch.rand(codewords, part.shape[0], 1, generator=generator, dtype=torch.float64)
    uniform = uniform.to(x.device)
    chosen = _by_weight(weight, uniform[0])
    picked = [chosen]
    closest = torch.full_like(norms, torch.inf)
    for step in range(1, codewords):
        latest = part.gather(1, chosen.unsqueeze(-1).expand(-1, 1, part.shape[2]))  # [M, 1, d]
        # ‖x − c‖² = ‖x‖² + ‖c‖² − 2⟨c, x⟩
        distance = torch.baddbmm(norms, latest, channels, alpha=-2)
        distance += latest.square().sum(2, keepdim=True)
        closest = torch.minimum(closest, distance.clamp_min_(0))
        chosen = _by_weight(closest[:, 0] * weight, uniform[step])
        picked.append(chosen)
    return _take(x, drawn.gather(1, torch.cat(picked, 1)))


def _draw(
    x: torch.Tensor, count: int, weights: torch.Tensor | None, generator: torch.Generator
) -> torch.Tensor:
    """Indices `[M, count]` without repeats; those of weight 0 come last."""
    if weights is None:
        return torch.randperm(x.shape[0], generator=generator)[:count].expand(x.shape[1], -1)
    # The smallest of exponential variables of rates w: sampling without repeats by weight.
    keys = torch.empty(x.shape[:2]).exponential_(generator=generator) / weights.cpu()
    return keys.topk(count, dim=0, largest=False).indices.t()


def _by_weight(weight: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Indices `[M, 1]` into `[M, n]` in proportion to the weight (fp64); `uniform` is in [0, 1)."""
    cumulated = weight.cumsum(1)
    chosen = torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True)
    return chosen.clamp_max(weight.shape[1] - 1)


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`x` `[N, M, d]` at `index` `[M, n]`, as `[M, n, d]`."""
    return x[index, torch.arange(x.shape[1], device=x.device).unsqueeze(1)]
