"""Codes of a layer's heads chosen together: sweeps over heads, one after the other.

A program takes its vectors through all heads of a set and all sweeps. Their errors, in fp16 and as
multiples of the set's longest codeword, lie in global memory, where only this program reads them:
how far they push a head is a product for each other head with the coupling of both. The head's
codes are then nearest codewords, group by group: a product with ones and zeros puts the channels of
a group where the search wants them, and changes no bit of their fp16 halves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vqkv.kernels.gpu.encode import FARTHEST, highest


@triton.jit
def encode_heads(
    x, books, words, units, coupling, errors, codes, vectors, sweeps,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, DIM: tl.constexpr,
    SIZE: tl.constexpr, PART: tl.constexpr, DEPTH: tl.constexpr, CHANNELS: tl.constexpr,
    VECTORS: tl.constexpr,
):  # fmt: skip
    """Codes `[N, M]` of `x` `[N, M, d]` under `books` `[M, K, d]`, M = B · HEADS · GROUPS.

    `words` and `units` are of `prepare_books`, `coupling` `[B, h, n, h, n]`, n = GROUPS · d, and
    `errors` `[N, M d]` zeros. Grid: (blocks of `VECTORS` vectors, B).
    """
    N: tl.constexpr = GROUPS * DIM
    PADDED: tl.constexpr = triton.next_power_of_2(GROUPS)
    OF_SET: tl.constexpr = HEADS * GROUPS
    first = tl.program_id(1).to(tl.int64) * OF_SET
    subvectors = tl.num_programs(1) * OF_SET
    coupling += tl.program_id(1).to(tl.int64) * (HEADS * N * HEADS * N)
    vector = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    there = vector < vectors
    channel = tl.arange(0, CHANNELS)
    inside = there[:, None] & (channel < N)[None, :]
    square = (channel < N)[:, None] & (channel < N)[None, :]
    every = tl.arange(0, PADDED)
    of_set = tl.arange(0, triton.next_power_of_2(OF_SET))
    set_units = tl.load(units + first + of_set, mask=of_set < OF_SET, other=0.0)
    largest = tl.max(set_units, 0)
    for step in range(sweeps * HEADS):
        head = step % HEADS
        group = first + head * GROUPS
        pushed = tl.zeros([VECTORS, CHANNELS], tl.float32)
        for other in range(HEADS):
            at = (vector[:, None] * subvectors + first + other * GROUPS) * DIM + channel[None, :]
            error = tl.load(errors + at, mask=inside, other=0.0)
            pair = coupling + (other * N * HEADS + head) * N
            column = pair + channel[:, None] * (HEADS * N) + channel[None, :]
            pushed += tl.dot(error, tl.load(column, mask=square, other=0.0))
        own_at = (vector[:, None] * subvectors + group) * DIM + channel[None, :]
        own = tl.load(x + own_at, mask=inside, other=0.0).to(tl.float32) / largest
        chosen = _group_by_group(
            own - pushed, words + group * (SIZE * DEPTH), units + group, largest,
            GROUPS, K, DIM, SIZE, PART, DEPTH, CHANNELS,
        )  # fmt: skip
        here = there[:, None] & (every < GROUPS)[None, :]
        row = vector[:, None] * subvectors + group
        tl.store(codes + row + every[None, :], chosen, mask=here)
        tl.debug_barrier()  # other threads want a group's code, for each of its channels
        code = tl.load(codes + row + channel[None, :] // DIM, mask=inside, other=0)
        word = ((group + channel // DIM)[None, :] * K + code) * DIM + (channel % DIM)[None, :]
        found = tl.load(books + word, mask=inside, other=0.0).to(tl.float32) / largest
        error = tl.clamp(found - own, -FARTHEST, FARTHEST).to(tl.float16)
        tl.store(errors + own_at, error, mask=inside)
        tl.debug_barrier()  # and the errors, as operands


@triton.jit
def _group_by_group(
    z, words, units, largest,
    GROUPS: tl.constexpr, K: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr,
    PART: tl.constexpr, DEPTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Codes `[vectors, GROUPS, padded]` of a head's channels `z` `[vectors, CHANNELS]`.

    `z` is in the unit `largest`, and no codeword in a larger one. `words` and `units` are of
    `prepare_books`, from the head's first group on.
    """
    PADDED: tl.constexpr = triton.next_power_of_2(GROUPS)
    lane = tl.arange(0, DEPTH)[None, :]
    channel = tl.arange(0, CHANNELS)
    every = tl.arange(0, PADDED)
    z = tl.clamp(z, -FARTHEST, FARTHEST)
    z_high = z.to(tl.float16)
    z_low = (z - z_high.to(tl.float32)).to(tl.float16)
    chosen = tl.zeros([z.shape[0], PADDED], tl.int32)
    for group in range(GROUPS):
        # Three times side by side, as the search takes them.
        here = (channel[:, None] == group * DIM + lane % DIM) & (lane < 3 * DIM)
        here = here.to(tl.float16)
        subvector = tl.dot(z_low, here, tl.dot(z_high, here))
        unit = tl.load(units + group) / largest
        code = highest(subvector, words + group * (SIZE * DEPTH), unit, K, DIM, SIZE, PART)
        chosen = tl.where(every[None, :] == group, code[:, None], chosen)
    return chosen
