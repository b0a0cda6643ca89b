"""Split-KV attention on codes, and the merge of its splits.

A program reads one page of 64 tokens an iteration, once for all query rows of a KV head. Rows are
the M operand of both products: scores `[rows, tokens] = q K^T` and output `[rows, D] = p V`. With
tokens as M, Hopper's wgmma takes them; but ptxas 12.8, which comes with Triton 3.6, then has some
variants that turn queries read a register before it is written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vqkv.kernels.gpu.lookup import load_words, look_up, turn

PAGE = tl.constexpr(64)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def attend_split(
    query, key_codes, key_books, value_codes, value_books, start, stop, pages, page_turns,
    offset_turns, pairs, output, lse, key_mean,
    key_row, key_head, key_token, value_row, value_head, value_token, pages_row, turns_row,
    batches, heads, rows, splits, processors,
    D: tl.constexpr, ROWS: tl.constexpr,
    KM: tl.constexpr, KS: tl.constexpr, KK: tl.constexpr, KD: tl.constexpr, KWORD: tl.constexpr,
    VM: tl.constexpr, VS: tl.constexpr, VK: tl.constexpr, VD: tl.constexpr, VWORD: tl.constexpr,
    PAGED: tl.constexpr, ROPE: tl.constexpr, KEY_SUMS: tl.constexpr,
):  # fmt: skip
    """One split of one KV head of one row of the batch; a row's own pages are split evenly.

    Grid: H · blocks of query rows · B · splits. A GPU deals programs out to its multiprocessors in
    turn; those that meet on one get neighbouring work, so that it holds one head's codebooks in L1.
    """
    shared, left = tl.num_programs(0) // processors, tl.num_programs(0) % processors
    turn_of, dealt_to = tl.program_id(0) // processors, tl.program_id(0) % processors
    work = dealt_to * shared + tl.minimum(dealt_to, left) + turn_of
    split = work % splits
    batch = (work // splits % batches).to(tl.int64)
    head = work // (splits * batches) % heads
    block = work // (splits * batches * heads)
    begin = tl.load(start + batch)
    end = tl.load(stop + batch)

    WORDS: tl.constexpr = triton.next_power_of_2(KM * KS // KWORD)
    PARTS: tl.constexpr = KWORD // KS
    KEY_WIDTH: tl.constexpr = WORDS * PARTS * KD
    VALUE_WIDTH: tl.constexpr = VWORD // VS * VD * triton.next_power_of_2(VM * VS // VWORD)
    row = block * ROWS + tl.arange(0, ROWS)
    row_there = row < rows
    query += (batch * heads + head) * rows * D
    key_codes += head.to(tl.int64) * key_head
    value_codes += head.to(tl.int64) * value_head
    key_books += head * (KM * KS * KK * KD)
    value_books += head * (VM * VS * VK * VD)

    token = tl.arange(0, PAGE)
    if ROPE:
        HALF: tl.constexpr = KEY_WIDTH // 2
        pair = tl.arange(0, HALF)
        pair_there = pair < D // 2
        which = tl.load(pairs + head * (D // 2) + pair, mask=pair_there, other=0)
        channel = tl.arange(0, KEY_WIDTH)
        there = row_there[:, None] & (channel < D)[None, :]
        rows_q = tl.load(query + row[:, None] * D + channel[None, :], mask=there, other=0.0)
        rows_q = rows_q.to(tl.float32) * LOG2_E
        q_even, q_odd = tl.split(rows_q.reshape(ROWS, HALF, 2))
        page_turns += batch * turns_row
        # Of every pair in the order of `look_up`; the same in every page.
        coded_pair = (
            tl.arange(0, WORDS)[:, None, None, None] * (PARTS * KD // 2)
            + tl.arange(0, PARTS)[None, None, None, :] * (KD // 2)
            + tl.arange(0, KD // 2)[None, None, :, None]
        )
        coded_there = coded_pair < D // 2
        turned = tl.load(pairs + head * (D // 2) + coded_pair, mask=coded_there, other=0)
        angle = offset_turns + (token[None, :, None, None] * (D // 2) + turned) * 2
        cosine = tl.load(angle).to(tl.float16)
        sine = tl.load(angle + 1).to(tl.float16)
    else:
        channel = tl.arange(0, KEY_WIDTH)
        there = row_there[:, None] & (channel < D)[None, :]
        q = tl.load(query + row[:, None] * D + channel[None, :], mask=there, other=0.0)
        q = (q.to(tl.float32) * LOG2_E).to(tl.float16)

    first = begin // PAGE
    count = tl.where(end > begin, tl.cdiv(end, PAGE) - first, 0)
    share = tl.cdiv(count, splits)
    low = first + split * share
    high = tl.minimum(low + share, first + count)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS, PAGE], tl.float32)  # added up over tokens after the loop
    total = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    if KEY_SUMS:
        key_total = tl.zeros([ROWS, KEY_WIDTH], tl.float32)
    for page in range(low, high):
        slot = page * PAGE + token
        present = (slot >= begin) & (slot < end)
        if PAGED:
            page_at = tl.load(pages + batch * pages_row + page).to(tl.int64)
            key_page = key_codes + page_at * key_row
            value_page = value_codes + page_at * value_row
        else:
            first_slot = tl.full((), page, tl.int64) * PAGE
            key_page = key_codes + batch * key_row + first_slot * key_token
            value_page = value_codes + batch * value_row + first_slot * value_token
        key_words = load_words(key_page, key_token, present, PAGE, KM * KS, KWORD)
        keys = look_up(key_words, key_books, KK, KS, KM, KD, KWORD)
        # Asked for here, codes of values arrive while codewords of keys do.
        value_words = load_words(value_page, value_token, present, PAGE, VM * VS, VWORD)
        if ROPE:
            page_angle = page_turns + (page * (D // 2) + which) * 2
            c = tl.load(page_angle)[None, :]
            s = tl.load(page_angle + 1)[None, :]
            # Even channels of a subvector before its odd ones: pairs then fill whole registers.
            q = tl.join(q_even * c + q_odd * s, q_odd * c - q_even * s)
            q = q.reshape(ROWS, WORDS * PARTS, KD // 2, 2).permute(0, 1, 3, 2)
            q = q.reshape(ROWS, KEY_WIDTH).to(tl.float16)
            x, y = turn(keys, cosine, sine)
            turned_keys = tl.join(x, y).permute(0, 3, 4, 2, 1).reshape(KEY_WIDTH, PAGE)
            scores = tl.dot(q, turned_keys)
        else:
            scores = tl.dot(q, keys.permute(0, 3, 2, 1).reshape(KEY_WIDTH, PAGE))
        scores = tl.where(present[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        scale = tl.exp2(top - new_top)
        weight = weight * scale[:, None] + p
        top = new_top
        values = look_up(value_words, value_books, VK, VS, VM, VD, VWORD)
        values = values.permute(1, 0, 3, 2).reshape(PAGE, VALUE_WIDTH)
        p = p.to(tl.float16)
        total = tl.dot(p, values, total * scale[:, None])
        if KEY_SUMS:
            plain = keys.permute(1, 0, 3, 2).reshape(PAGE, KEY_WIDTH)
            key_total = tl.dot(p, plain, key_total * scale[:, None])

    weight = tl.sum(weight, 1)
    weight = tl.where(weight > 0, weight, 1.0)  # no token: zeros, and top is -inf
    inverse = 1 / weight
    place = ((split * batches + batch) * heads + head) * rows + row
    tl.store(lse + place, (top + tl.log2(weight)) * LN_2, mask=row_there)
    _store(output, place, total * inverse[:, None], row_there, D)
    if KEY_SUMS:
        _store(key_mean, place, key_total * inverse[:, None], row_there, D)


@triton.jit
def _store(to, place, found, there, D: tl.constexpr):
    """Rows `[rows, D padded]` as rows of `D`."""
    channel = tl.arange(0, found.shape[1])
    where = to + place[:, None] * D + channel[None, :]
    tl.store(where, found, mask=there[:, None] & (channel < D)[None, :])


@triton.jit
def merge_splits(
    output, lse, key_mean, merged, merged_lse, merged_key_mean, rows,
    D: tl.constexpr, SPLITS: tl.constexpr, KEY_SUMS: tl.constexpr,
):  # fmt: skip
    """One of `rows` (over batch, query heads and query rows): its splits by log-sum-exp.

    Splits that saw no token weigh nothing, whatever their output.
    """
    TILE: tl.constexpr = min(16, triton.next_power_of_2(SPLITS))
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, triton.next_power_of_2(SPLITS))
    parts = tl.load(lse + split * rows + row, mask=split < SPLITS, other=float("-inf"))
    top = tl.max(parts, 0)
    whole = tl.sum(_weights(parts, top), 0)
    whole = tl.where(whole > 0, whole, 1.0)
    tl.store(merged_lse + row, top + tl.log(whole))
    channel = tl.arange(0, triton.next_power_of_2(D))
    total = tl.zeros([TILE, channel.shape[0]], tl.float32)
    key_total = tl.zeros([TILE, channel.shape[0]], tl.float32)
    for first in range(0, SPLITS, TILE):
        index = first + tl.arange(0, TILE)
        part = tl.load(lse + index * rows + row, mask=index < SPLITS, other=float("-inf"))
        weight = _weights(part, top)[:, None]
        place = (index * rows + row)[:, None] * D + channel[None, :]
        real = (index < SPLITS)[:, None] & (channel < D)[None, :]
        total += weight * tl.load(output + place, mask=real, other=0.0)
        if KEY_SUMS:
            key_total += weight * tl.load(key_mean + place, mask=real, other=0.0)
    place = row * D + channel
    tl.store(merged + place, tl.sum(total, 0) / whole, mask=channel < D)
    if KEY_SUMS:
        tl.store(merged_key_mean + place, tl.sum(key_total, 0) / whole, mask=channel < D)


@triton.jit
def _weights(lse, top):
    """Of splits, in units of the largest; where no split has tokens all are 0."""
    return tl.where(lse == float("-inf"), 0.0, tl.exp(lse - top))
