"""Codes back to vectors in memory."""

from __future__ import annotations

import triton
import triton.language as tl

from vqkv.kernels.gpu.lookup import load_words, look_up, turn

PAGE = tl.constexpr(64)


@triton.jit
def decode_vectors(
    codes, books, decoded, rows, subvectors,
    S: tl.constexpr, K: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Vectors `[N, M, d]` (fp32) of `codes` `[N, M, S]` under `books` `[M, S, K, d]`.

    Grid: blocks of the N · M rows.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, triton.next_power_of_2(DIM))[None, :]
    there = row < rows
    real = there[:, None] & (channel < DIM)
    total = tl.zeros([ROWS, channel.shape[1]], tl.float32)
    for stage in tl.static_range(S):
        code = tl.load(codes + row * S + stage, mask=there, other=0).to(tl.int64)
        word = ((row % subvectors) * S + stage) * K + code
        found = tl.load(books + word[:, None] * DIM + channel, mask=real, other=0.0)
        total += found.to(tl.float32)
    tl.store(decoded + row[:, None] * DIM + channel, total, mask=real)


@triton.jit
def decode_pages(
    codes, books, pages, page_turns, offset_turns, pairs, states,
    code_row, code_head, code_token, state_row, state_head, first, tokens, pages_row, turns_row,
    D: tl.constexpr, M: tl.constexpr, S: tl.constexpr, K: tl.constexpr, DIM: tl.constexpr,
    WORD: tl.constexpr, PAGED: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """States `[B, H, tokens, D]` of a range of pages that begins with page `first`.

    Grid: (H, pages of the range, B).
    """
    head = tl.program_id(0)
    page = first + tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    token = tl.arange(0, PAGE)
    slot = tl.program_id(1) * PAGE + token
    present = slot < tokens
    if PAGED:
        codes += tl.load(pages + batch * pages_row + page).to(tl.int64) * code_row
    else:
        codes += batch * code_row + page.to(tl.int64) * PAGE * code_token
    codes += head.to(tl.int64) * code_head
    words = load_words(codes, code_token, present, PAGE, M * S, WORD)
    vectors = look_up(words, books + head * (M * S * K * DIM), K, S, M, DIM, WORD)

    PARTS: tl.constexpr = WORD // S
    WORDS: tl.constexpr = words.shape[0]
    if ROPE:
        pair = (
            tl.arange(0, WORDS)[:, None, None, None] * (PARTS * DIM // 2)
            + tl.arange(0, PARTS)[None, None, None, :] * (DIM // 2)
            + tl.arange(0, DIM // 2)[None, None, :, None]
        )
        which = tl.load(pairs + head * (D // 2) + pair, mask=pair < D // 2, other=0)
        there = page_turns + batch * turns_row + (page * (D // 2) + which) * 2
        here = offset_turns + (token[None, :, None, None] * (D // 2) + which) * 2
        a, b = tl.load(there), tl.load(there + 1)
        c, s = tl.load(here), tl.load(here + 1)
        x, y = turn(vectors.to(tl.float32), a * c - b * s, a * s + b * c)
        vectors = tl.join(x, y).permute(1, 0, 3, 2, 4)
    else:
        vectors = vectors.permute(1, 0, 3, 2)
    channel = tl.arange(0, WORDS * PARTS * DIM)
    to = states + batch * state_row + head.to(tl.int64) * state_head
    to += slot[:, None].to(tl.int64) * D + channel[None, :]
    vectors = vectors.reshape(PAGE, WORDS * PARTS * DIM).to(states.dtype.element_ty)
    tl.store(to, vectors, mask=present[:, None] & (channel < D)[None, :])
