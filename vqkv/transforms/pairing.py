"""Which RoPE pairs of a head are coded together."""

from __future__ import annotations

import math
from itertools import combinations, product

import torch
from einops import rearrange

from vqkv.rotation import Pairs, channel_units
from vqkv.transforms.roots import roots

#: Of a sum: what an exchange of pairs has to gain, so that rounding does not go on for ever.
LEAST_GAIN = 1e-9


def paired_groups(
    covariance: torch.Tensor, metric: torch.Tensor, pairs: Pairs, dim: int, bits: int
) -> torch.Tensor:
    """Channels `[D]` of a head, those of a group of `dim` side by side.

    From snake order of energy `tr(Cov M)` on, two groups exchange two pairs as long as the sum of
    `left_over` falls. Groups that leave most come first. Channels outside of pairs go two by two.

    Args:
        covariance: of a head's channels, `[D, D]` in fp64.
        metric: M, in which errors cost `eᵀ M e`, likewise.
        pairs: RoPE pairs of a head.
        dim: channels of a group, an even number that divides D.
        bits: of a group's code.
    """

    def costs(groups: torch.Tensor) -> torch.Tensor:
        """Of groups `[..., d / 2, 2]`."""
        channels = groups.flatten(-2)
        rows, columns = channels.unsqueeze(-1), channels.unsqueeze(-2)
        root, _ = roots(metric[rows, columns])
        return left_over(root @ covariance[rows, columns] @ root, bits)

    units = channel_units(len(covariance), pairs)  # [D / 2, 2]
    energy = (covariance * metric).sum(1)  # the diagonal of Cov M
    rounds = units[energy[units].sum(1).argsort(descending=True, stable=True)]
    rounds = rearrange(rounds, "(r g) c -> r g c", r=dim // 2)
    rounds[1::2] = rounds[1::2].flip(1)
    groups = rearrange(rounds, "r g c -> g r c").clone()  # [G, d / 2, 2]
    left = costs(groups)
    exchanged = dim > 2  # of single pairs an exchange changes nothing
    # How often each group has changed, and how often when two of them were last tried.
    changes, seen = [0] * len(groups), dict[tuple[int, int], tuple[int, int]]()
    while exchanged:
        exchanged = False
        for one, other in combinations(range(len(groups)), 2):
            now = changes[one], changes[other]
            if seen.get((one, other)) == now:
                continue
            seen[one, other] = now
            tried = _exchanges(groups[one], groups[other])
            found = costs(tried)  # [tried, 2]
            best = int(found.sum(1).argmin())
            if found[best].sum() < (1 - LEAST_GAIN) * left[[one, other]].sum():
                groups[[one, other]], left[[one, other]] = tried[best], found[best]
                changes[one] += 1
                changes[other] += 1
                exchanged = True
    return groups[left.argsort(descending=True, stable=True)].flatten()


def left_over(covariance: torch.Tensor, bits: int) -> torch.Tensor:
    """Mean squared error that an ideal code of Gaussian vectors leaves, `[...]`.

    Reverse water-filling: components of the covariance `[..., n, n]` above the water share the bits
    so that as much is left of each, those below are left as they are.
    """
    strongest_first = torch.linalg.eigvalsh(covariance).flip(-1).clamp(min=1e-300)
    count = torch.arange(1, covariance.shape[-1] + 1, device=covariance.device)
    # Where so many components get bits.
    water = ((strongest_first.log().cumsum(-1) - 2 * math.log(2) * bits) / count).exp()
    above = (strongest_first >= water).sum(-1, keepdim=True).clamp(min=1)
    level = water.gather(-1, above - 1)
    return torch.where(count <= above, level, strongest_first).sum(-1)


def _exchanges(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Two groups `[r, 2]` with any pair of one and of the other exchanged, `[r², 2, r, 2]`."""
    size = len(one)
    tried = torch.stack([one, other]).expand(size, size, 2, size, 2).clone()
    for i, j in product(range(size), repeat=2):
        tried[i, j, 0, i], tried[i, j, 1, j] = other[j], one[i]
    return tried.flatten(0, 1)
