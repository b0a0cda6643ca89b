"""Scores of keys that commute with RoPE from a table of the query's products, no key decoded.

`⟨q, e^{imθ} k⟩ = Re Σ_j e^{imθ_j} conj(q_j) k_j`: codewords are multiplied with the query once for
all tokens, a token's codes look products up and add them, and its position turns the sum (CommVQ,
arXiv 2506.18879, section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from vqkv.kernels.attend.commuting import CommutingKeys, as_complex, summed, with_turned
from vqkv.kernels.attend.naive import attend as attend_by
from vqkv.kernels.attend.naive import products
from vqkv.kernels.select import Kernel
from vqkv.layouts import Layout

if TYPE_CHECKING:
    from vqkv.kernels.attend import Block, Reading


def attend(
    query: torch.Tensor,
    blocks: Iterable[Block],
    scaling: float,
    null_scores: torch.Tensor | None = None,
) -> torch.Tensor:
    """Output `[B, Q, t, D]`, in the query's type; rows that see no token get zeros.

    Coded keys of all blocks have the same units, so one table serves all of them.
    """
    table: torch.Tensor | None = None

    def score(q: torch.Tensor, keys: torch.Tensor | CommutingKeys) -> torch.Tensor:
        nonlocal table
        if isinstance(keys, torch.Tensor):
            return products(q, keys)
        if table is None:
            table = product_table(q, keys)
        return from_table(table, keys)

    return attend_by(query, blocks, scaling, null_scores, score)


def product_table(q: torch.Tensor, keys: CommutingKeys) -> torch.Tensor:
    """`conj(q_j) u_j` for each unit u and i u, `[t, B, H, 2 S, size, D]` of q `[B, H, t, D]`."""
    rows = as_complex(q[..., keys.order]).conj().permute(2, 0, 1, 3)
    table = rows[:, :, :, None, None] * as_complex(keys.units.float())
    return with_turned(torch.view_as_real(table).flatten(-2))


def from_table(table: torch.Tensor, keys: CommutingKeys) -> torch.Tensor:
    """Scores `[B, H, t, n]` (fp32) of tables `[t, B, H, 2 S, size, D]`."""
    indices = keys.indices()
    # Re(w z) is the dot product of conj(w) and z as two channels each.
    turns = torch.view_as_real(keys.turns.conj().resolve_conj()).flatten(-2).unsqueeze(1)
    scores = [(turns * summed(row, indices)).sum(-1) * keys.scale for row in table]
    return torch.stack(scores, 2)


def pays(layout: Layout, rows: int, tokens: int) -> bool:
    """Whether a table takes fewer operations than decoding the keys of `tokens` coded tokens.

    Per token and head, additions and multiplications of channels (a complex product is 6 of them
    for 2 channels), with S stages of `size` units and R rows, which are query positions times the
    query heads of a KV head:

        decode:  2 S D to add up units, D to scale, 3 D to turn, 2 D R for the scores
        table:   R (2 S D to add up products, 2 D to turn and sum) and, once, 3 S size D R

    With one row a table leaves out 4 D a token and pays from `3 S size / 4` tokens on: 480 with 10
    stages of 64 units, 1,008 with 21. With two the sums, done twice, cost more than is saved.
    """
    segment = layout.segments[0]
    stages, size = segment.stages, 1 << (segment.code_bits // 2)
    decoding = (2 * stages + 4 + 2 * rows) * tokens
    tabling = rows * ((2 * stages + 2) * tokens + 3 * stages * size)
    return tabling < decoding


def refuses(reading: Reading, device: torch.device) -> str | None:
    """Commuting units, read by one query head each."""
    if not reading.keys.commuting:
        return "keys are not sums of units that commute with RoPE"
    if reading.readers > 1:
        return (
            f"{reading.readers} query heads read a KV head, and each needs a table and sums of its "
            "own where decoding serves all"
        )
    return None


KERNEL = Kernel("attend", "commuted", attend, refuses, speed=1)
