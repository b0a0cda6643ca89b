"""Where k-means starts: K of the samples."""

from __future__ import annotations

import torch

from vqkv.kernels.encode.naive import MAX_SCORES

#: k-means++ sees this many samples, or 4 per codeword where that is more.
PLUS_PLUS_SAMPLES = 4096

#: Codewords that k-means++ draws one at a time.
ONE_BY_ONE = 64


def random_samples(
    x: torch.Tensor, codewords: int, weights: torch.Tensor | None, generator: torch.Generator
) -> torch.Tensor:
    """K different samples per subspace, `[M, K, d]`, drawn in proportion to their weights."""
    return _take(x, _draw(x, codewords, weights, generator).to(x.device))


def plus_plus(
    x: torch.Tensor, codewords: int, weights: torch.Tensor | None, generator: torch.Generator
) -> torch.Tensor:
    """k-means++ (Arthur, Vassilvitskii 2007) on a random part of the samples, `[M, K, d]`.

    The next codewords are samples drawn in proportion to their weight times the squared distance
    to the codewords before them. From the 65th on several are drawn at a time, which costs no
    quality that shows and saves most of the passes (as k-means||, Bahmani and others 2012).
    """
    count = min(x.shape[0], max(PLUS_PLUS_SAMPLES, 4 * codewords))
    used = None if weights is None else (weights > 0).float()
    drawn = _draw(x, count, used, generator).to(x.device)  # [M, n]
    part = _take(x, drawn)
    part = part - part.mean(1, keepdim=True)  # keeps the products below from cancelling
    weight = torch.ones_like(part[..., 0]) if weights is None else weights.t().gather(1, drawn)
    channels = part.transpose(1, 2).contiguous()  # [M, d, n]
    norms = channels.square().sum(1)  # [M, n]
    uniform = torch.rand(part.shape[0], codewords, generator=generator, dtype=torch.float64)
    uniform = uniform.to(x.device)
    chosen = _by_weight(weight, uniform[:, :1])
    picked = [chosen]
    total = 1
    at_most = max(1, MAX_SCORES // weight.numel())
    closest = torch.full_like(weight, torch.inf)
    while total < codewords:
        latest = part.gather(1, chosen.unsqueeze(-1).expand(-1, -1, part.shape[2]))  # [M, r, d]
        half_norms = latest.square().sum(2, keepdim=True).div_(2)
        # ‖x − c‖² = ‖x‖² + 2 (‖c‖²/2 − ⟨x, c⟩)
        scores = torch.baddbmm(half_norms, latest, channels, alpha=-1)  # [M, r, n]
        nearest = scores.amin(1).mul_(2).add_(norms).clamp_min_(0)
        closest = torch.minimum(closest, nearest)
        step = 1 if total < ONE_BY_ONE else min(total // 8, at_most, codewords - total)
        # One draw in each of `step` equal parts of the whole keeps them from falling together.
        parts = torch.arange(step, device=x.device)
        chosen = _by_weight(closest * weight, (parts + uniform[:, total : total + step]) / step)
        picked.append(chosen)
        total += step
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
    """Indices `[M, r]` into `[M, n]` in proportion to the weight; `uniform` is in [0, 1)."""
    cumulated = weight.cumsum(1, dtype=torch.float64)
    chosen = torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True)
    return chosen.clamp_max(weight.shape[1] - 1)


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`x` `[N, M, d]` at `index` `[M, n]`, as `[M, n, d]`."""
    return x[index, torch.arange(x.shape[1], device=x.device).unsqueeze(1)]
