"""Bits where they gain most: by pairs of channels within a token, and by tokens within a run.

Reverse water-filling in whole bits: of Gaussian sources of given variances, coded with so many bits
together, the sum of errors is least where every next bit goes to the source whose error it lowers
most. All here is integers once it is learned, so that it is the same on any machine.
"""

from __future__ import annotations

import heapq
import math

import torch

#: A pair's error is about this times 2⁻ᵏ of its variance after k bits.
LOSS = 1.17
#: Gains are logarithms in steps of this part of an octave.
STEPS = 8
#: Octaves by which a token may be stronger or weaker than usual.
REACH = 8


def growth(
    variances: list[float], most_bytes: int, most_bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pair that gets each next bit of a token, and what each next byte gains.

    Args:
        variances: of pairs.
        most_bytes: that a token can have.
        most_bits: that a pair can have.

    Returns:
        pairs `[8 B]` (int16), and gains `[B]` (int16) in eighths of octaves, never rising.
    """
    bits = [0] * len(variances)

    def gain(pair: int) -> float:
        after = LOSS * 2.0 ** -(bits[pair] + 1)
        before = 1.0 if not bits[pair] else 2 * after
        return max(variances[pair], 1e-30) * (before - after)

    heap = [(-gain(pair), pair) for pair in range(len(variances))]
    heapq.heapify(heap)
    pairs: list[int] = []
    gains: list[int] = []
    for _ in range(most_bytes):
        total = 0.0
        for _ in range(8):
            lost, pair = heapq.heappop(heap)
            total -= lost
            pairs.append(pair)
            bits[pair] += 1
            if bits[pair] < most_bits:
                heapq.heappush(heap, (-gain(pair), pair))
        level = math.floor(STEPS * math.log2(total))
        gains.append(min([level, *gains[-1:]]))
    return torch.tensor(pairs, dtype=torch.int16), torch.tensor(gains, dtype=torch.int16)


class SharedBits:
    """Shares bytes out to the tokens of runs.

    Attributes:
        pairs: `[8 B]`, as `growth` gives it.
        gains: `[B]`.
        widths: `[B + 1, P]` (int64): bits of each pair of a token of so many bytes.
        ends: `[B + 1, P]`: bits of such a token up to the end of each pair.
    """

    def __init__(self, pairs: torch.Tensor, gains: torch.Tensor, count: int) -> None:
        self.pairs, self.gains = pairs, gains
        each = torch.nn.functional.one_hot(pairs.long().view(-1, 8), count).sum(1)
        self.widths = torch.cat([each.new_zeros(1, count), each]).cumsum(0)
        self.ends = self.widths.cumsum(1)
        self._rising = gains.long().flip(0)
        # Thresholds that buy all and nothing, whatever the tokens; known here, a GPU is not asked.
        self._all = int(gains[-1]) - STEPS * REACH
        self._nothing = int(gains[0]) + STEPS * REACH + 1

    def bytes_of(self, octaves: torch.Tensor, budget: int) -> torch.Tensor:
        """Bytes `[R, tokens]` (int64) of tokens `2^octaves` `[R, tokens]` as strong as usual, at
        most 8 octaves away from it.

        The highest gains that a run's budget pays for; what is left over goes to the first tokens
        that have a gain of the next level.
        """
        offsets = (STEPS * octaves).long()

        def bought(threshold: torch.Tensor) -> torch.Tensor:
            needed = threshold.unsqueeze(1) - offsets
            return len(self._rising) - torch.searchsorted(self._rising, needed)

        least = torch.full_like(offsets[:, 0], self._all)
        enough = torch.full_like(least, self._nothing)
        # By bisection: `enough` can be paid for, thresholds below `least` can not.
        for _ in range((self._nothing - self._all).bit_length()):
            middle = (least + enough) // 2
            pays = bought(middle).sum(1) <= budget
            enough = torch.where(pays, middle, enough)
            least = torch.where(pays, least, middle + 1)
        found = bought(enough)
        more = bought(enough - 1) - found
        rest = (budget - found.sum(1)).unsqueeze(1)
        return found + (rest - (more.cumsum(1) - more)).clamp_min(0).minimum(more)
