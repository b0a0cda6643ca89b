"""Tokens coded by a trellis, in torch: all states of all tokens at once."""

from __future__ import annotations

import torch

from vqkv.kernels.decode.trellis import Strings
from vqkv.kernels.select import Kernel, anywhere


def decode_trellis(strings: Strings, units: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Pairs `[N, P, 2]`."""
    states = states_of(strings, len(table).bit_length() - 1)
    return table[states] * units[strings.counts]


def states_of(strings: Strings, memory: int) -> torch.Tensor:
    """States `[N, P]` (int64) of L = `memory` bits."""
    ends = strings.ends[strings.counts]
    last = (8 * strings.offsets.unsqueeze(1) + ends - 1).clamp_min(0)
    byte = last >> 3
    codes = torch.nn.functional.pad(strings.codes.long(), (2, 0))
    word = (codes[byte] << 16) | (codes[byte + 1] << 8) | codes[byte + 2]
    known = (1 << ends.clamp_max(memory)) - 1
    return (word >> (7 - (last & 7))) & known


KERNEL = Kernel("decode_trellis", "naive", decode_trellis, anywhere, speed=0)
