"""Codes of a unit's groups chosen together, by the matrix instructions of `encode`.

A program keeps its vectors' errors in all groups of a head, in fp16 and as multiples of the head's
longest codeword, and goes through the groups: how far the other errors push a group's vector is one
product with the metric's columns of the group, and its new error gets to its channels by another.

The first pass looks ahead. It is like the others, with the upper triangular V in place of the
metric, and codewords times the group's own block of it. Errors begin as −x, what is missing where
nothing is chosen: pushed through V, they also give x times that block, and those of later groups
push nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vqkv.kernels.gpu.encode import FARTHEST, highest, longest, prepared


@triton.jit
def prepare_books(
    books, words, units, K: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """Codewords of `[M, K, d]` as a product takes them, `[M, SIZE, DEPTH]`, in `units` `[M]`.

    Grid: (M).
    """
    subvector = tl.program_id(0)
    word = tl.arange(0, SIZE)
    book = books + subvector * (K * DIM)
    unit = longest(book, word, K, DIM)
    found = prepared(book, word, unit, K, DIM, DEPTH)
    lane = tl.arange(0, DEPTH)[None, :]
    place = subvector.to(tl.int64) * SIZE + word[:, None]
    tl.store(words + place * DEPTH + lane, found)
    tl.store(units + subvector, unit)


@triton.jit
def encode_jointly(
    x, books, words, units, matrices, codes, vectors, passes,
    GROUPS: tl.constexpr, K: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr,
    PART: tl.constexpr, DEPTH: tl.constexpr, CHANNELS: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """Codes `[N, M]` of `x` `[N, M, d]` under `books` `[M, K, d]`, M = U · GROUPS.

    `words` and `units` are of `[2, M]` books, `matrices` `[2, U, n, n]`, n = GROUPS · d: those of
    the first pass, then those of all others. CHANNELS is a power of two from n on. Grid: (blocks
    of `VECTORS` vectors, U).
    """
    N: tl.constexpr = GROUPS * DIM
    PADDED: tl.constexpr = triton.next_power_of_2(GROUPS)
    head = tl.program_id(1)
    subvectors = tl.num_programs(1) * GROUPS
    matrices += head.to(tl.int64) * (N * N)
    vector = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    there = vector < vectors
    lane = tl.arange(0, DEPTH)[None, :]
    from_lane = tl.arange(0, DEPTH)[:, None]
    channel = tl.arange(0, CHANNELS)
    every = tl.arange(0, PADDED)
    every_unit = tl.load(units + subvectors + head * GROUPS + every, mask=every < GROUPS, other=0.0)
    largest = tl.max(every_unit, 0)
    real = there[:, None] & (lane < 3 * DIM)
    at = x + (vector[:, None] * subvectors + head * GROUPS) * DIM + channel[None, :]
    states = tl.load(at, mask=there[:, None] & (channel < N)[None, :], other=0.0).to(tl.float32)
    errors = tl.clamp(-states / largest, -FARTHEST, FARTHEST).to(tl.float16)
    for step in range(passes):
        sweeping = tl.minimum(step, 1)
        matrix = matrices + sweeping * tl.num_programs(1).to(tl.int64) * (N * N)
        for group in range(GROUPS):
            subvector = head * GROUPS + group
            book = sweeping * subvectors + subvector
            pushing = (channel < N) & ((channel // DIM != group) | (step == 0))
            # Three times side by side, as the vectors.
            columns = tl.load(
                matrix + channel[:, None] * N + group * DIM + lane % DIM,
                mask=pushing[:, None] & (lane < 3 * DIM),
                other=0.0,
            )
            pushed = tl.dot(errors, columns.to(tl.float16)) * largest
            row = vector * subvectors + subvector
            own = tl.load(x + row[:, None] * DIM + lane % DIM, mask=real, other=0.0).to(tl.float32)
            unit, own_words = tl.load(units + book), words + book * (SIZE * DEPTH)
            code = highest(own * sweeping - pushed, own_words, unit, K, DIM, SIZE, PART)
            if step + 1 == passes:
                tl.store(codes + row, code.to(codes.dtype.element_ty), mask=there)
            word = books + (subvector * K + code[:, None]) * DIM + lane % DIM
            found = tl.load(word, mask=real & (lane < DIM), other=0.0).to(tl.float32)
            error = tl.clamp((found - own) / largest, -FARTHEST, FARTHEST)
            error = tl.where(lane < DIM, error, 0.0).to(tl.float16)
            here = (from_lane < DIM) & (channel[None, :] == group * DIM + from_lane)
            placed = tl.dot(error, here.to(tl.float16)).to(tl.float16)
            errors = tl.where((channel // DIM == group)[None, :], placed, errors)
