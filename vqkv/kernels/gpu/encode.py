"""Nearest codewords by matrix instructions, stage after stage.

A product of fp32 numbers is three of fp16, x = x₁ + x₂ and c = c₁ + c₂: x·c ≈ x₁c₁ + x₂c₁ + x₁c₂.
Side by side, with ‖c‖²/2 in two more channels, they fill the depth of 16 that one matrix
instruction takes anyway where d ≤ 4. Both sides are divided by a power of two first, so that no
codeword leaves fp16's range.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Vectors this many times as long as the longest codeword are cut: fp16 ends at 65,504.
REACH = tl.constexpr(60000.0)


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
        words, unit = _words(books, tl.arange(0, SIZE), K, DIM, DEPTH)
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
                _, code = _best(residual, words, unit, tl.arange(0, SIZE), K, DIM, SIZE)
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
        words, unit = _words(book, word, K, DIM, residual.shape[1])
        top, found = _best(residual, words, unit, word, K, DIM, SIZE)
        code = tl.where(top > best, found, code)
        best = tl.maximum(best, top)
    return code


@triton.jit
def _words(book, word, K: tl.constexpr, DIM: tl.constexpr, DEPTH: tl.constexpr):
    """Codewords as a product takes them, `[words, depth]`, in a power of two as unit."""
    lane = tl.arange(0, DEPTH)[None, :]
    real = (word < K)[:, None] & (lane < 3 * DIM)
    words = tl.load(book + word[:, None] * DIM + lane % DIM, mask=real, other=0.0).to(tl.float32)
    longest = tl.max(tl.max(tl.abs(words), 1), 0)
    unit = tl.exp2(tl.ceil(tl.log2(tl.maximum(longest, 1e-12))))
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
def _best(residual, words, unit, word, K: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr):
    """The largest x·c − ‖c‖²/2 of each vector, and the lowest code that has it."""
    lane = tl.arange(0, residual.shape[1])[None, :]
    x = tl.minimum(tl.maximum(residual / unit, -REACH), REACH)
    high = x.to(tl.float16)
    low = (x - high.to(tl.float32)).to(tl.float16)
    x = tl.where((lane >= DIM) & (lane < 2 * DIM), low, high)
    x = tl.where((lane == 3 * DIM) | (lane == 3 * DIM + 1), 1.0, x)
    scores = tl.dot(x.to(tl.float16), tl.trans(words))
    if K % SIZE:
        scores = tl.where((word < K)[None, :], scores, float("-inf"))
    top = tl.max(scores, 1)
    found = tl.min(tl.where(scores == top[:, None], word[None, :], K), 1)
    return top * unit * unit, found
