"""Codewords that nobody uses get a second life beside the busiest ones."""

from __future__ import annotations

import torch

from vqkv.codebooks.statistics import from_first_rank

#: Distance of the two halves of a split codeword, in root-mean-square errors of its subspace.
SPLIT = 0.01


def split_fullest(
    codewords: torch.Tensor,
    counts: torch.Tensor,
    inertia: torch.Tensor,
    dead: torch.Tensor,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the j-th dead codeword of a subspace next to the j-th fullest, which stays put.

    Since every other codeword stays, the samples' inertia cannot rise. Needs no samples, so it
    works on statistics merged over shards, where all ranks move alike.

    Args:
        codewords: `[M, K, d]`.
        counts: use of each codeword, `[M, K]`.
        inertia: mean squared error of each subspace, `[M]`, which scales the step aside.
        dead: which codewords to revive, `[M, K]` (bool).
        generator: on the CPU.

    Returns:
        The codewords, and for each the index of the one that it was split from, or its own.
        A dead codeword that finds no used one to split stays as it is.
    """
    size, dim = codewords.shape[1:]
    alive = torch.where(dead, -1.0, counts)
    fullest = alive.argsort(dim=1, descending=True, stable=True)
    rank = (dead.long().cumsum(1) - 1).clamp_min(0)
    donor = fullest.gather(1, rank)
    revived = dead & (alive.gather(1, donor) > 0)
    noise = from_first_rank(torch.randn(codewords.shape, generator=generator).to(codewords))
    aside = noise * (SPLIT * (inertia / dim).sqrt().float()).view(-1, 1, 1)
    beside = codewords.gather(1, donor.unsqueeze(-1).expand(-1, -1, dim)) + aside
    own = torch.arange(size, device=codewords.device).expand_as(donor)
    return (
        torch.where(revived.unsqueeze(-1), beside, codewords),
        torch.where(revived, donor, own),
    )
