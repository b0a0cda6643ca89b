"""Nearest codewords by matrix instructions, stage after stage.

A product of fp32 numbers is three of fp16, x = x₁ + x₂ and c = c₁ + c₂: x·c ≈ x₁c₁ + x₂c₁ + x₁c₂.
Side by side, with ‖c‖²/2 in two more channels, they fill the depth of 16 that one matrix
instruction takes anyway where d ≤ 4. Both sides are divided by powers of two first, so that no
codeword is longer than 1 and no vector either; where a vector shrinks, so does its ‖c‖²/2.

The search for the best of 256 scores would cost more than the product. So sums begin with 6:
between 4 and 8 all floats have one exponent, and their order is that of their bits as integers.
With the code in place of the uppermost bits, which are all alike, one maximum finds both.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Where sums of scores in (-2, 2) begin, and the bits that all of them then have in common.
MIDDLE, COMMON = tl.constexpr(6.0), tl.constexpr(0x40800000)
LEAST = tl.constexpr(-(2**31))
#: Lengths of a head's longest codeword: beyond, fp16 has no numbers, and all codes are as wrong.
FARTHEST = tl.constexpr(6e4)


@triton.jit
def encode_codes(
    x, books, codes, vectors, subvectors,
    S: tl.constexpr, K: tl.constexpr, DIM: tl.constexpr, VECTORS: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Codes `[N, M, S]` of `x` `[N, M, d]` under `books` `[M, S, K, d]`, greedy over stages.

    Grid: (runs of `BLOCKS` blocks of `VECTORS` vectors, M).
    """
    _encode(x, books, codes, vectors, subvectors, S, K, DIM, VECTORS, BLOCKS)


@triton.jit
def encode_pair(
    key_x, key_books, key_codes, key_vectors, key_subvectors,
    value_x, value_books, value_codes, value_vectors, value_subvectors,
    KS: tl.constexpr, KK: tl.constexpr, KD: tl.constexpr,
    VS: tl.constexpr, VK: tl.constexpr, VD: tl.constexpr,
    VECTORS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Keys and values in one launch. Grid: (runs of blocks, the larger M, 2)."""
    if tl.program_id(2) == 0:
        if tl.program_id(1) < key_subvectors:
            _encode(
                key_x, key_books, key_codes, key_vectors, key_subvectors,
                KS, KK, KD, VECTORS, BLOCKS,
            )  # fmt: skip
    else:
        if tl.program_id(1) < value_subvectors:
            _encode(
                value_x, value_books, value_codes, value_vectors, value_subvectors,
                VS, VK, VD, VECTORS, BLOCKS,
            )  # fmt: skip


@triton.jit
def _encode(x, books, codes, vectors, subvectors, S: tl.constexpr, K: tl.constexpr,
            DIM: tl.constexpr, VECTORS: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    # Codewords whose scores are held at a time.
    SIZE: tl.constexpr = min(256, max(16, triton.next_power_of_2(K)))
    DEPTH: tl.constexpr = max(16, triton.next_power_of_2(3 * DIM + 2))
    ONE: tl.constexpr = S == 1 and K <= SIZE
    subvector = tl.program_id(1)
    books += subvector * (S * K * DIM)
    lane = tl.arange(0, DEPTH)[None, :]
    channel = lane % DIM
    if ONE:  # all codewords stay for all blocks
        words, unit = prepared(books, tl.arange(0, SIZE), K, DIM, DEPTH)
    for block in range(BLOCKS):
        first = (tl.program_id(0).to(tl.int64) * BLOCKS + block) * VECTORS
        vector = first + tl.arange(0, VECTORS)
        there = vector < vectors
        row = vector * subvectors + subvector
        real = there[:, None] & (lane < 3 * DIM)
        # Three times side by side, as the product takes it.
        residual = tl.load(x + row[:, None] * DIM + channel, mask=real, other=0.0).to(tl.float32)
        for stage in tl.static_range(S):
            book = books + stage * (K * DIM)
            if ONE:
                _, code = highest(residual, words, unit, 0, K, DIM, SIZE)
            else:
                code = _nearest(residual, book, K, DIM, SIZE)
            tl.store(codes + row * S + stage, code.to(codes.dtype.element_ty), mask=there)
            if stage + 1 < S:
                found = tl.load(book + code[:, None] * DIM + channel, mask=real, other=0.0)
                residual -= found.to(tl.float32)


@triton.jit
def _nearest(residual, book, K: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr):
    """The lowest of the nearest codewords' codes, `SIZE` codewords at a time."""
    best = tl.full([residual.shape[0]], float("-inf"), tl.float32)
    code = tl.zeros([residual.shape[0]], tl.int32)
    for first in range(0, K, SIZE):
        word = first + tl.arange(0, SIZE)
        words, unit = prepared(book, word, K, DIM, residual.shape[1])
        top, found = highest(residual, words, unit, first, K, DIM, SIZE)
        code = tl.where(top > best, found, code)
        best = tl.maximum(best, top)
    return code


@triton.jit
def prepared(book, word, K: tl.constexpr, DIM: tl.constexpr, DEPTH: tl.constexpr):
    """Codewords as a product takes them, `[words, depth]`, in a power of two as unit."""
    lane = tl.arange(0, DEPTH)[None, :]
    real = (word < K)[:, None] & (lane < 3 * DIM)
    words = tl.load(book + word[:, None] * DIM + lane % DIM, mask=real, other=0.0).to(tl.float32)
    unit = power_of_2(tl.max(_length(words, DIM), 0), 1e-12)
    words /= unit
    high = words.to(tl.float16)
    low = (words - high.to(tl.float32)).to(tl.float16)
    half_norm = tl.sum(tl.where(lane < DIM, words * words, 0.0), 1)[:, None] / 2
    norm_high = half_norm.to(tl.float16)
    norm_low = (half_norm - norm_high.to(tl.float32)).to(tl.float16)
    words = tl.where(lane < 2 * DIM, high, low)
    words = tl.where(lane == 3 * DIM, -norm_high, words)
    return tl.where(lane == 3 * DIM + 1, -norm_low, words), unit


@triton.jit
def highest(residual, words, unit, first, K: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr):
    """The largest x·c − ‖c‖²/2 of each vector, and the lowest code that has it, from `first` on."""
    lane = tl.arange(0, residual.shape[1])[None, :]
    shrunk = 1 / power_of_2(_length(residual, DIM) / unit, 1.0)
    x = residual * (shrunk / unit)[:, None]
    high = x.to(tl.float16)
    low = (x - high.to(tl.float32)).to(tl.float16)
    x = tl.where((lane >= DIM) & (lane < 2 * DIM), low, high)
    x = tl.where((lane == 3 * DIM) | (lane == 3 * DIM + 1), shrunk[:, None], x)
    middle = tl.full([residual.shape[0], SIZE], MIDDLE, tl.float32)
    scores = tl.dot(x.to(tl.float16), tl.trans(words), middle)
    # Of equal scores the lowest code's is the largest number.
    place = tl.arange(0, SIZE)[None, :]
    ordered = (scores.to(tl.int32, bitcast=True) << 8) | (255 - place)
    if K % SIZE:
        ordered = tl.where(first + place < K, ordered, LEAST)
    best = tl.max(ordered, 1)
    top = ((best >> 8) & 0x7FFFFF | COMMON).to(tl.float32, bitcast=True) - MIDDLE
    return top / shrunk * unit * unit, first + 255 - (best & 255)


@triton.jit
def _length(vectors, DIM: tl.constexpr):
    """Of rows `[rows, depth]` that begin with a vector."""
    lane = tl.arange(0, vectors.shape[1])[None, :]
    return tl.sqrt(tl.sum(tl.where(lane < DIM, vectors * vectors, 0.0), 1))


@triton.jit
def power_of_2(x, least):
    """The least that is not below x, nor below `least` in magnitude."""
    return tl.exp2(tl.ceil(tl.log2(tl.maximum(x, least))))
