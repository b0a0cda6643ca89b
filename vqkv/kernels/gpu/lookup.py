"""Codes of a page to vectors in registers: what every kernel that reads codes begins with.

Lanes lie across tokens, so that a warp's gathers fall into one codebook and hit few cache lines;
the last axis is a codeword, read by one load of 8 or 16 bytes. Codes come as words of `WORD` bytes,
each the codes of `WORD // S` neighbouring subvectors, and are taken apart in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_words(
    codes, stride, present, TOKENS: tl.constexpr, BYTES: tl.constexpr, WORD: tl.constexpr
):
    """Words `[words, tokens]` of a page, padded to a power of two; absent tokens have code 0.

    `codes` points to the page's first token; a token is `stride` bytes after the one before it,
    and `BYTES` of them hold codes.
    """
    WORDS: tl.constexpr = BYTES // WORD
    PADDED: tl.constexpr = triton.next_power_of_2(WORDS)
    word = tl.arange(0, PADDED)[:, None]
    token = tl.arange(0, TOKENS)[None, :]
    if WORD == 4:
        pointer = codes.to(tl.pointer_type(tl.uint32))
    elif WORD == 2:
        pointer = codes.to(tl.pointer_type(tl.uint16))
    else:
        pointer = codes
    mask = present[None, :]
    if PADDED != WORDS:
        mask = mask & (word < WORDS)
    # Past L1, where the codebooks are: codes are read once.
    place = pointer + token * (stride // WORD) + word
    return tl.load(place, mask=mask, other=0, cache_modifier=".cg")


@triton.jit
def look_up(words, books, K: tl.constexpr, S: tl.constexpr, M: tl.constexpr, DIM: tl.constexpr,
            WORD: tl.constexpr):  # fmt: skip
    """Vectors `[words, tokens, d, parts]` of one head's codebooks `[M, S, K, d]`.

    Subvector m is part `m % parts` of word `m // parts`.
    """
    if WORD == S:
        one = _part(words, books, 0, K, S, M, DIM, WORD)
        return one.reshape(one.shape[0], one.shape[1], DIM, 1)
    elif WORD == 2 * S:
        return tl.join(
            _part(words, books, 0, K, S, M, DIM, WORD), _part(words, books, 1, K, S, M, DIM, WORD)
        )
    else:
        even = tl.join(
            _part(words, books, 0, K, S, M, DIM, WORD), _part(words, books, 2, K, S, M, DIM, WORD)
        )
        odd = tl.join(
            _part(words, books, 1, K, S, M, DIM, WORD), _part(words, books, 3, K, S, M, DIM, WORD)
        )
        four = tl.join(even, odd)
        return four.reshape(four.shape[0], four.shape[1], DIM, 4)


@triton.jit
def _part(words, books, part: tl.constexpr, K: tl.constexpr, S: tl.constexpr, M: tl.constexpr,
          DIM: tl.constexpr, WORD: tl.constexpr):  # fmt: skip
    """The subvectors `[words, tokens, d]` that are each word's `part`-th."""
    PARTS: tl.constexpr = WORD // S
    subvector = tl.arange(0, words.shape[0])[:, None, None] * PARTS + part
    if words.shape[0] * PARTS != M:
        subvector = tl.minimum(subvector, M - 1)  # what padding reads is left out later
    first = books + subvector * (S * K * DIM) + tl.arange(0, DIM)[None, None, :]
    code = (words >> (8 * part * S)) & 255
    vectors = tl.load(first + code.to(tl.int32)[:, :, None] * DIM)
    for stage in tl.static_range(1, S):
        code = (words >> (8 * (part * S + stage))) & 255
        vectors += tl.load(first + stage * K * DIM + code.to(tl.int32)[:, :, None] * DIM)
    return vectors


@triton.jit
def turn(vectors, cosine, sine):
    """Pairs of neighbouring channels turned: the even channels of the result, and the odd ones.

    Vectors are `[words, tokens, d, parts]`, the others `[words, tokens, d / 2, parts]`.
    """
    words: tl.constexpr = vectors.shape[0]
    tokens: tl.constexpr = vectors.shape[1]
    half: tl.constexpr = vectors.shape[2] // 2
    parts: tl.constexpr = vectors.shape[3]
    pairs = vectors.reshape(words, tokens, half, 2, parts).permute(0, 1, 2, 4, 3)
    x, y = tl.split(pairs)
    return x * cosine - y * sine, y * cosine + x * sine
