"""The best path through a trellis: bits of all pairs of channels chosen together."""

from __future__ import annotations

import torch

from vqkv.errors import StateError
from vqkv.kernels.select import select
from vqkv.layouts import Layout, Segment


def encode_trellis(
    x: torch.Tensor, cost: torch.Tensor, table: torch.Tensor, widths: torch.Tensor
) -> torch.Tensor:
    """Bits `[N, n]` (int32) of pairs `[N, n, 2]` that cost least.

    They minimise `Σ_p Σ_i cost_pi (x_pi − T[state_p]_i)²`, where
    `state_p = (state_{p−1} 2^{k_p} + bits_p) mod 2^L`, from 0 on; k_p are the `widths`.

    Args:
        x: fp32.
        cost: `[n, 2]`, fp32, not negative.
        table: T, `[2^L, 2]`, fp32.
        widths: `[n]`, integers from 1 to L, at most 12.

    Raises:
        StateError: shapes that do not fit each other, or widths out of range.
    """
    pairs, memory = len(widths), len(table).bit_length() - 1
    fits = (
        x.ndim == 3
        and tuple(x.shape[1:]) == (pairs, 2)
        and tuple(cost.shape) == (pairs, 2)
        and tuple(widths.shape) == (pairs,)
        and tuple(table.shape) == (1 << memory, 2)
        and 4 <= memory <= 14
    )
    if not fits:
        raise StateError(
            "x is [N, n, 2], cost [n, 2], widths [n] and the table [2^L, 2], L from 4 to 14; given "
            f"{[list(tensor.shape) for tensor in (x, cost, widths, table)]}"
        )
    if not pairs:
        return x.new_empty(len(x), 0, dtype=torch.int32)
    steps = widths.tolist()
    if not all(1 <= step <= min(memory, 12) for step in steps):
        raise StateError(f"widths are from 1 to {min(memory, 12)} bits, given {steps}")
    layout = Layout(1, 2 * pairs, (Segment(1, pairs, 2, 1, min(memory, 12), 1),))
    kernel = select("encode_trellis", layout, x.device).kernel
    codes: torch.Tensor = kernel(x, cost, table, steps)
    return codes
