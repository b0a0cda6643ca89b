"""What one pass of assignment leaves behind: all that k-means and EMA need from their samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed


@dataclass(frozen=True)
class Statistics:
    """Sums over samples by nearest codeword, all fp64. Those of parts add up to the whole's.

    Attributes:
        sums: of the (weighted) samples of each codeword, `[M, K, d]`.
        counts: samples, or their weight, of each codeword, `[M, K]`.
        inertia: (weighted) squared distances to the nearest codeword, `[M]`.
    """

    sums: torch.Tensor
    counts: torch.Tensor
    inertia: torch.Tensor

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            self.sums + other.sums, self.counts + other.counts, self.inertia + other.inertia
        )

    def scaled(self, factor: float) -> Statistics:
        """Every sum times `factor`."""
        return Statistics(self.sums * factor, self.counts * factor, self.inertia * factor)

    def all_reduced(self) -> Statistics:
        """The sum over the ranks of `torch.distributed`, or the same where it is not in use."""
        if not distributed():
            return self
        flat = torch.cat([self.sums.flatten(), self.counts.flatten(), self.inertia])
        torch.distributed.all_reduce(flat)
        sums, counts, inertia = flat.split(
            [self.sums.numel(), self.counts.numel(), self.inertia.numel()]
        )
        return Statistics(sums.view_as(self.sums), counts.view_as(self.counts), inertia)

    def means(self, codewords: torch.Tensor) -> torch.Tensor:
        """Lloyd's update `c_k = Σ x / n_k`, `[M, K, d]` in fp32; a dead codeword stays put."""
        counts = self.counts.unsqueeze(-1)
        return torch.where(counts > 0, (self.sums / counts).float(), codewords)

    @property
    def dead(self) -> torch.Tensor:
        """Codewords that no sample uses, `[M, K]` (bool)."""
        return self.counts == 0

    @property
    def mean_inertia(self) -> float:
        """Mean squared distance per vector, over all subspaces."""
        return float((self.inertia / self.counts.sum(1)).mean())


def distributed() -> bool:
    """Several processes learn together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def from_first_rank(tensor: torch.Tensor) -> torch.Tensor:
    """Rank 0's tensor on every rank, or the same where `torch.distributed` is not in use."""
    if not distributed():
        return tensor
    shared = tensor.contiguous().clone()
    torch.distributed.broadcast(shared, src=0)
    return shared
