"""What follows attention on codes: the output mapped back and exact tokens, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def precise(a, b):
    """A product on matrix units of fp32 and whatever is given, as if all of it were fp32."""
    if b.dtype == tl.float32:
        return tl.dot(a, b, input_precision="tf32x3")
    else:
        # States stay as they are: it is cheaper to take the few rows twice.
        high = a.to(b.dtype)
        return tl.dot(high, b) + tl.dot((a - high.to(tl.float32)).to(b.dtype), b)


@triton.jit
def add_mapped(sums, means, maps, at, there, D: tl.constexpr, DEPTH: tl.constexpr):
    """Adds means `[rows, D]`, which begin at `at`, through a map `[D, D]`."""
    channel = tl.arange(0, sums.shape[1])
    for first in range(0, D, DEPTH):
        z = first + tl.arange(0, DEPTH)
        mean = tl.load(means + at[:, None] + z, mask=there[:, None] & (z < D), other=0.0)
        inside = (z < D)[:, None] & (channel < D)[None, :]
        part = tl.load(maps + z[:, None] * D + channel, mask=inside, other=0.0)
        sums = tl.dot(mean, part, sums, input_precision="tf32")
    return sums


@triton.jit
def add_exact(
    query, there, sums, best, total, keys, values, key_token, value_token, hidden, tokens,
    D: tl.constexpr, HIDDEN: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Goes on with an online softmax over a run of exact tokens of one head."""
    channel = tl.arange(0, sums.shape[1])
    for first in range(0, tokens, TOKENS):
        token = first + tl.arange(0, TOKENS)
        inside = (token < tokens)[:, None] & (channel < D)[None, :]
        at = token[:, None].to(tl.int64)
        key = tl.load(keys + at * key_token + channel, mask=inside, other=0.0)
        scores = precise(query, tl.trans(key))
        seen = there[:, None] & (token < tokens)[None, :]
        if HIDDEN:
            seen = seen & (tl.load(hidden[:, None] + token, mask=seen, other=1) == 0)
        scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        # Rows that have seen nothing yet: -inf - -inf.
        origin = tl.where(higher == -float("inf"), 0.0, higher)
        shrink = tl.exp(best - origin)
        weights = tl.exp(scores - origin[:, None])
        value = tl.load(values + at * value_token + channel, mask=inside, other=0.0)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None] + precise(weights, value)
        best = higher
    return sums, best, total


# Neither is worth another variant: one of them changes with every token.
@triton.jit(do_not_specialize=["sinks", "tail"])
def attend_rest(
    query, means, lse, key_means, maps, bias, hidden, null, output,
    sink_keys, sink_values, sinks, tail_keys, tail_values, tail,
    sink_key_row, sink_key_head, sink_key_token, sink_value_row, sink_value_head, sink_value_token,
    tail_key_row, tail_key_head, tail_key_token, tail_value_row, tail_value_head, tail_value_token,
    rows,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    DEPTH: tl.constexpr, KEY_SUMS: tl.constexpr, BIAS: tl.constexpr, HIDDEN: tl.constexpr,
    NULL: tl.constexpr,
):  # fmt: skip
    """Output `[B, H, R, D]` of R rows of queries on a KV head.

    Grid: (blocks of R, H, B).
    """
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    item = (batch * tl.num_programs(1) + head) * rows + row
    channel = tl.arange(0, WIDTH)
    real = there[:, None] & (channel < D)[None, :]
    at = item * D
    q = tl.load(query + at[:, None] + channel, mask=real, other=0.0)

    # What is coded comes first, as one entry of the softmax.
    best = tl.load(lse + item, mask=there, other=-float("inf"))
    total = tl.where(best == -float("inf"), 0.0, 1.0)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    maps += head * ((1 + KEY_SUMS) * D * D)
    sums = add_mapped(sums, means, maps, at, there, D, DEPTH)
    if KEY_SUMS:
        sums = add_mapped(sums, key_means, maps + D * D, at, there, D, DEPTH)
    if BIAS:
        sums += tl.load(bias + head * D + channel, mask=channel < D, other=0.0)[None, :]
    sums *= total[:, None]
    if NULL:
        score = tl.load(null + head * rows + row, mask=there, other=0.0)
        higher = tl.maximum(best, score)
        shrink = tl.exp(best - higher)
        sums *= shrink[:, None]
        total = total * shrink + tl.exp(score - higher)
        best = higher

    hidden += item * (sinks + tail)
    sink_keys += batch * sink_key_row + head.to(tl.int64) * sink_key_head
    sink_values += batch * sink_value_row + head.to(tl.int64) * sink_value_head
    sums, best, total = add_exact(
        q, there, sums, best, total, sink_keys, sink_values, sink_key_token, sink_value_token,
        hidden, sinks, D, HIDDEN, TOKENS,
    )  # fmt: skip
    tail_keys += batch * tail_key_row + head.to(tl.int64) * tail_key_head
    tail_values += batch * tail_value_row + head.to(tl.int64) * tail_value_head
    sums, best, total = add_exact(
        q, there, sums, best, total, tail_keys, tail_values, tail_key_token, tail_value_token,
        hidden + sinks, tail, D, HIDDEN, TOKENS,
    )  # fmt: skip
    sums /= tl.where(total > 0, total, 1.0)[:, None]  # rows that see nothing: zeros
    tl.store(output + at[:, None] + channel, sums, mask=real)
