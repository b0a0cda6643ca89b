"""The best path through a trellis, in torch: all states of many vectors at once, pair by pair."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vqkv.kernels.select import Kernel, anywhere

#: Vectors at a time: what came before each state is kept for all pairs.
ROWS = 128


def encode_trellis(
    x: torch.Tensor, cost: torch.Tensor, table: torch.Tensor, widths: Sequence[int]
) -> torch.Tensor:
    """Bits `[N, n]` (int32), by Viterbi's algorithm."""
    parts = [_searched(part, cost, table, widths) for part in x.split(ROWS)]
    return torch.cat(parts) if parts else x.new_empty(0, len(widths), dtype=torch.int32)


def _searched(
    x: torch.Tensor, cost: torch.Tensor, table: torch.Tensor, widths: Sequence[int]
) -> torch.Tensor:
    states = len(table)
    least = x.new_full((len(x), states), torch.inf)
    least[:, 0] = 0
    came: list[torch.Tensor] = []
    for pair, width in enumerate(widths):
        # States that agree in all but their oldest `width` bits go on to the same ones.
        best, oldest = least.unflatten(1, (1 << width, -1)).min(1)
        came.append(oldest.short())
        distance = ((x[:, pair, None] - table) * cost[pair].sqrt()).square().sum(2)
        least = best.repeat_interleave(1 << width, 1) + distance
    codes = torch.empty(len(x), len(widths), dtype=torch.int32, device=x.device)
    state = least.argmin(1)
    for pair, width in reversed(list(enumerate(widths))):
        codes[:, pair] = state & ((1 << width) - 1)
        state = state >> width
        oldest = came[pair].gather(1, state.unsqueeze(1)).squeeze(1).long()
        state = oldest * (states >> width) + state
    return codes


KERNEL = Kernel("encode_trellis", "naive", encode_trellis, anywhere, speed=0)
