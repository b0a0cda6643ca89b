"""Tokens coded by a trellis, each a string of bytes of its own length, to pairs of channels."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vqkv.errors import StateError
from vqkv.kernels.select import select
from vqkv.layouts import Layout, Segment


class Strings(NamedTuple):
    """Where tokens' bytes lie, and what their bits mean.

    Attributes:
        codes: `[n]` (int32), bytes of all tokens.
        offsets: `[N]` (int64), each token's first byte.
        counts: `[N]` (int64), how many it has.
        ends: `[B + 1, P]` (int64): bits of a token of so many bytes up to the end of each pair.
    """

    codes: torch.Tensor
    offsets: torch.Tensor
    counts: torch.Tensor
    ends: torch.Tensor


def decode_trellis(strings: Strings, units: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Pairs `[N, P, 2]` (fp32): `units[count, p] ∘ table[state_p]`.

    A state is the L bits of its token that end with its pair's; bits before the first are 0.

    Args:
        strings: every token's bytes lie within `codes`.
        units: `[B + 1, P, 2]`, fp32; 0 for pairs without bits.
        table: `[2^L, 2]`, fp32, L at most 16.

    Raises:
        StateError: shapes that do not fit each other, or a token outside of the codes.
    """
    sizes, pairs = strings.ends.shape
    memory = len(table).bit_length() - 1
    fits = (
        strings.codes.ndim == 1
        and strings.offsets.shape == strings.counts.shape == (len(strings.offsets),)
        and units.shape == (sizes, pairs, 2)
        and table.shape == (1 << memory, 2)
        and memory <= 16
    )
    if not fits:
        shapes = [list(tensor.shape) for tensor in (*strings, units, table)]
        raise StateError(f"codes, offsets, counts, ends, units and table do not fit: {shapes}")
    layout = Layout(1, 2 * pairs, (Segment(1, pairs, 2, 1, min(memory, 16), 1),))
    kernel = select("decode_trellis", layout, strings.codes.device).kernel
    found: torch.Tensor = kernel(strings, units, table)
    return found
