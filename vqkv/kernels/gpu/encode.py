"""Nearest codewords by matrix instructions, stage after stage.

A product of fp32 numbers is three of fp16, x = x₁ + x₂ and c = c₁ + c₂: x·c ≈ x₁c₁ + x₂c₁ + x₁c₂.
Side by side, with ‖c‖²/2 in two more channels and a constant in another, they fit into the depth
of 16 that one matrix instruction takes anyway where d ≤ 4. Both sides are divided by powers of two
first, so that no codeword is longer than 1 and no vector either; where a vector shrinks, so does
its ‖c‖²/2.

The search for the best of 256 scores would cost more than the product. So all scores are raised
by 6: between 4 and 8 all floats have one exponent, and their order is that of their bits as
integers. With the code in place of the uppermost bits, which are all alike, one maximum finds both.
The product adds the 6. Sums must not begin with it: ptxas 12.8 takes sums of wgmma that begin with
a constant for that constant.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: By what scores in (-2, 2) are raised, and the bits that all of them then have in common.
MIDDLE, COMMON = tl.constexpr(6.0), tl.constexpr(0x40800000)
LEAST = tl.constexpr(-(2**31))
#: Lengths of the longest codeword that a program searches: beyond, fp16 has no numbers, and all
#: codes are as wrong.
FARTHEST = tl.constexpr(6e4)


@triton.jit
def encode_codes(
    x, books, codes, vectors, subvectors,
    S: tl.constexpr, K: tl.constexpr, DIM: tl.constexpr, VECTORS: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Codes `[N, M, S]` of `x` `[N, M, d]` under `books` `[M, S, K, d]`, greedy over stages.

    Grid: (M, runs of `BLOCKS` blocks of `VECTORS` vectors). Programs that run at a time read lines
    side by side, of which each takes a part.
    """
    _encode(
        tl.program_id(0), tl.program_id(1), x, books, codes, vectors, subvectors,
        S, K, DIM, VECTORS, BLOCKS,
    )  # fmt: skip


@triton.jit
def encode_pair(
    key_x, key_books, key_codes, key_vectors, key_subvectors,
    value_x, value_books, value_codes, value_vectors, value_subvectors,
    KS: tl.constexpr, KK: tl.constexpr, KD: tl.constexpr,
    VS: tl.constexpr, VK: tl.constexpr, VD: tl.constexpr,
    VECTORS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Keys and values in one launch. Grid: (the larger M, runs of blocks, 2)."""
    subvector, run = tl.program_id(0), tl.program_id(1)
    if tl.program_id(2) == 0:
        if subvector < key_subvectors:
            _encode(
                subvector, run, key_x, key_books, key_codes, key_vectors, key_subvectors,
                KS, KK, KD, VECTORS, BLOCKS,
            )  # fmt: skip
    else:
        if subvector < value_subvectors:
            _encode(
                subvector, run, value_x, value_books, value_codes, value_vectors, value_subvectors,
                VS, VK, VD, VECTORS, BLOCKS,
            )  # fmt: skip


@triton.jit
def _encode(subvector, run, x, books, codes, vectors, subvectors, S: tl.constexpr,
            K: tl.constexpr, DIM: tl.constexpr, VECTORS: tl.constexpr,
            BLOCKS: tl.constexpr):  # fmt: skip
    # Codewords whose codes take one byte, or fewer.
    SIZE: tl.constexpr = min(256, max(16, triton.next_power_of_2(K)))
    DEPTH: tl.constexpr = max(16, triton.next_power_of_2(3 * DIM + 3))
    # Scores of half of them leave registers for other programs.
    HALF: tl.constexpr = max(16, SIZE // 2)
    books += subvector * (S * K * DIM)
    lane = tl.arange(0, DEPTH)[None, :]
    channel, copied = lane % DIM, lane < 3 * DIM
    first = run.to(tl.int64) * BLOCKS * VECTORS
    if S == 1 and K <= SIZE:  # all codewords stay for all blocks
        word = tl.arange(0, HALF)
        unit = longest(books, tl.arange(0, SIZE), K, DIM)
        words = prepared(books, word, unit, K, DIM, DEPTH)
        if HALF < K:
            others = prepared(books, HALF + word, unit, K, DIM, DEPTH)
        residual, there, row = _vectors(
            x, first, vectors, subvector, subvectors, DIM, VECTORS, DEPTH
        )
        for block in range(BLOCKS):
            ahead = first + (block + 1) * VECTORS  # is on its way during the search
            more = tl.where(block + 1 < BLOCKS, vectors, 0)
            coming, next_there, next_row = _vectors(
                x, ahead, more, subvector, subvectors, DIM, VECTORS, DEPTH
            )
            operand, _ = raised(residual.to(tl.float32), unit, DIM)
            best = ordered(operand, words, 0, K, HALF, K % HALF != 0)
            if HALF < K:
                best = tl.maximum(best, ordered(operand, others, HALF, K, HALF, K % HALF != 0))
            tl.store(codes + row, named(best).to(codes.dtype.element_ty), mask=there)
            residual, there, row = coming, next_there, next_row
    else:
        for block in range(BLOCKS):
            residual, there, row = _vectors(
                x, first + block * VECTORS, vectors, subvector, subvectors, DIM, VECTORS, DEPTH
            )
            residual = residual.to(tl.float32)
            for stage in tl.static_range(S):
                book = books + stage * (K * DIM)
                code = _nearest(residual, book, K, DIM, SIZE)
                tl.store(codes + row * S + stage, code.to(codes.dtype.element_ty), mask=there)
                if stage + 1 < S:
                    found = tl.load(book + code[:, None] * DIM + channel, mask=copied, other=0.0)
                    residual -= found.to(tl.float32)


@triton.jit
def _vectors(x, first, vectors, subvector, subvectors,
             DIM: tl.constexpr, VECTORS: tl.constexpr, DEPTH: tl.constexpr):  # fmt: skip
    """Vectors from `first` on, three times side by side, as the product takes them; which there
    are; and the rows of their codes."""
    vector = first + tl.arange(0, VECTORS)
    there = vector < vectors
    row = vector * subvectors + subvector
    lane = tl.arange(0, DEPTH)[None, :]
    real = there[:, None] & (lane < 3 * DIM)
    return tl.load(x + row[:, None] * DIM + lane % DIM, mask=real, other=0.0), there, row


@triton.jit
def _nearest(residual, book, K: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr):
    """The lowest of the nearest codewords' codes, `SIZE` codewords at a time."""
    best = tl.full([residual.shape[0]], float("-inf"), tl.float32)
    code = tl.zeros([residual.shape[0]], tl.int32)
    for first in range(0, K, SIZE):
        word = first + tl.arange(0, SIZE)
        unit = longest(book, word, K, DIM)
        words = prepared(book, word, unit, K, DIM, residual.shape[1])
        operand, shrunk = raised(residual, unit, DIM)
        found = ordered(operand, words, first, K, SIZE, K % SIZE != 0)
        top = ((found >> 8) & 0x7FFFFF | COMMON).to(tl.float32, bitcast=True) - MIDDLE
        top = top / shrunk * unit * unit
        code = tl.where(top > best, first + named(found), code)
        best = tl.maximum(best, top)
    return code


@triton.jit
def longest(book, word, K: tl.constexpr, DIM: tl.constexpr):
    """The least power of two that no codeword is longer than."""
    lane = tl.arange(0, triton.next_power_of_2(DIM))[None, :]
    real = (word < K)[:, None] & (lane < DIM)
    words = tl.load(book + word[:, None] * DIM + lane, mask=real, other=0.0).to(tl.float32)
    return power_of_2(tl.max(tl.sqrt(tl.sum(words * words, 1)), 0), 1e-12)


@triton.jit
def prepared(book, word, unit, K: tl.constexpr, DIM: tl.constexpr, DEPTH: tl.constexpr):
    """Codewords in a unit as a product takes them, `[words, depth]`."""
    lane = tl.arange(0, DEPTH)[None, :]
    real = (word < K)[:, None] & (lane < 3 * DIM)
    words = tl.load(book + word[:, None] * DIM + lane % DIM, mask=real, other=0.0).to(tl.float32)
    words /= unit
    high = words.to(tl.float16)
    low = (words - high.to(tl.float32)).to(tl.float16)
    half_norm = tl.sum(tl.where(lane < DIM, words * words, 0.0), 1)[:, None] / 2
    norm_high = half_norm.to(tl.float16)
    norm_low = (half_norm - norm_high.to(tl.float32)).to(tl.float16)
    words = tl.where(lane < 2 * DIM, high, low)
    words = tl.where(lane == 3 * DIM, -norm_high, words)
    words = tl.where(lane == 3 * DIM + 1, -norm_low, words)
    return tl.where(lane == 3 * DIM + 2, 1.0, words).to(tl.float16)


@triton.jit
def raised(residual, unit, DIM: tl.constexpr):
    """Vectors `[rows, depth]` in the unit of codewords as a product takes them, and what they have
    shrunk by: it gives x·c − ‖c‖²/2, times that, plus 6."""
    lane = tl.arange(0, residual.shape[1])[None, :]
    squares = tl.sum(tl.where(lane < DIM, residual * residual, 0.0), 1)
    shrunk = 1 / power_of_2(tl.sqrt(squares) / unit, 1.0)
    x = residual * (shrunk / unit)[:, None]
    high = x.to(tl.float16)
    low = (x - high.to(tl.float32)).to(tl.float16)
    x = tl.where((lane >= DIM) & (lane < 2 * DIM), low, high)
    x = tl.where((lane == 3 * DIM) | (lane == 3 * DIM + 1), shrunk[:, None], x)
    return tl.where(lane == 3 * DIM + 2, MIDDLE, x).to(tl.float16), shrunk


@triton.jit
def ordered(operand, words, first, K: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr):
    """The largest score of each vector over `SIZE` codewords from `first` on, behind it the code.

    Of equal scores the lowest code's is the largest number. `MASKED` where some are but padding.
    """
    scores = tl.dot(operand, tl.trans(words))
    place = tl.arange(0, SIZE)[None, :]
    # The code is that within a byte's worth of codewords.
    numbers = scores.to(tl.int32, bitcast=True) * 256 + (255 - (first + place) % 256)
    if MASKED:
        numbers = tl.where(first + place < K, numbers, LEAST)
    return tl.max(numbers, 1)


@triton.jit
def named(best):
    """The code behind a score."""
    return 255 - (best & 255)


@triton.jit
def highest(residual, words, unit, K: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr,
            PART: tl.constexpr):  # fmt: skip
    """The lowest of the nearest codewords' codes of vectors, K ≤ SIZE ≤ 256.

    `words` points to what `prepared` made of codewords in `unit`, of which PART are read at a time:
    the scores of all may take more registers than there are.
    """
    DEPTH: tl.constexpr = residual.shape[1]
    operand, _ = raised(residual, unit, DIM)
    best = tl.full([residual.shape[0]], LEAST, tl.int32)
    for part in tl.static_range(SIZE // PART):
        word = part * PART + tl.arange(0, PART)[:, None]
        some = tl.load(words + word * DEPTH + tl.arange(0, DEPTH)[None, :])
        best = tl.maximum(best, ordered(operand, some, part * PART, K, PART, K != SIZE))
    return named(best)


@triton.jit
def power_of_2(x, least):
    """The least that is not below x, nor below `least` in magnitude."""
    return tl.exp2(tl.ceil(tl.log2(tl.maximum(x, least))))
