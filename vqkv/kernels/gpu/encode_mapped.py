"""States to bytes in one launch: linear maps, then nearest codewords, then codes side by side.

A program maps its vectors of a head once, by three products of fp16 halves (see `encode`), and
keeps what comes out as two halves, in the head's longest codeword as unit. A product with ones and
zeros then puts the channels of a group where the search wants them, and changes no bit of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vqkv.kernels.gpu.encode import FARTHEST, highest, power_of_2


@triton.jit
def encode_mapped(
    x, x_token, x_head, source, source_token, source_head,
    means, maps, source_maps, offsets, words, units, codes, vectors,
    D: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, DIM: tl.constexpr,
    SIZE: tl.constexpr, DEPTH: tl.constexpr, CHANNELS: tl.constexpr, VECTORS: tl.constexpr,
    SOURCE: tl.constexpr,
):  # fmt: skip
    """Codes `[N, H, GROUPS]` (uint8) of `x` `[N, H, D]`.

    What is coded is `(x - means) maps + source source_maps + offsets`, of `[H, D]`, `[H, D, n]` and
    `[H, n]`, n = GROUPS · DIM; `words` and `units` are of `prepare_books`. Grid: (blocks of
    `VECTORS` vectors, H).
    """
    N: tl.constexpr = GROUPS * DIM
    PADDED: tl.constexpr = triton.next_power_of_2(GROUPS)
    head = tl.program_id(1).to(tl.int64)
    vector = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    there = vector < vectors
    lane = tl.arange(0, DEPTH)[None, :]
    channel = tl.arange(0, CHANNELS)
    every = tl.arange(0, PADDED)
    every_unit = tl.load(units + head * GROUPS + every, mask=every < GROUPS, other=0.0)
    largest = tl.max(every_unit, 0)

    mean = tl.load(means + head * D + channel, mask=channel < D, other=0.0)
    own = _states(x + head * x_head, x_token, vector, there, channel, D) - mean[None, :]
    z = _mapped(own, maps + head * (D * N), channel, D, N)
    if SOURCE:
        other = _states(source + head * source_head, source_token, vector, there, channel, D)
        z += _mapped(other, source_maps + head * (D * N), channel, D, N)
    offset = tl.load(offsets + head * N + channel, mask=channel < N, other=0.0)
    z = tl.clamp((z + offset[None, :]) / largest, -FARTHEST, FARTHEST)
    z_high = z.to(tl.float16)
    z_low = (z - z_high.to(tl.float32)).to(tl.float16)

    chosen = tl.zeros([VECTORS, PADDED], tl.int32)
    for group in range(GROUPS):
        # Three times side by side, as the search takes them.
        here = (channel[:, None] == group * DIM + lane % DIM) & (lane < 3 * DIM)
        here = here.to(tl.float16)
        subvector = tl.dot(z_low, here, tl.dot(z_high, here))
        word = (head * GROUPS + group) * SIZE + tl.arange(0, SIZE)[:, None]
        book = tl.load(words + word * DEPTH + lane)
        unit = tl.load(units + head * GROUPS + group) / largest
        _, code = highest(subvector, book, unit, 0, K, DIM, SIZE)
        chosen = tl.where(every[None, :] == group, code[:, None], chosen)
    to = codes + (vector[:, None] * tl.num_programs(1) + head) * GROUPS + every[None, :]
    tl.store(to, chosen.to(tl.uint8), mask=there[:, None] & (every < GROUPS)[None, :])


@triton.jit
def _states(x, token, vector, there, channel, D: tl.constexpr):
    """`[VECTORS, CHANNELS]` in fp32, zeros beyond."""
    at = x + vector[:, None] * token + channel[None, :]
    return tl.load(at, mask=there[:, None] & (channel < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _mapped(states, maps, channel, D: tl.constexpr, N: tl.constexpr):
    """States through the map `[D, n]`; either is divided by a power of two first, to fit fp16."""
    inside = (channel < D)[:, None] & (channel < N)[None, :]
    weights = tl.load(maps + channel[:, None] * N + channel[None, :], mask=inside, other=0.0)
    w_unit = power_of_2(tl.max(tl.max(tl.abs(weights), 1), 0), 1e-30)
    x_unit = power_of_2(tl.max(tl.max(tl.abs(states), 1), 0), 1e-30)
    weights /= w_unit
    states /= x_unit
    w_high = weights.to(tl.float16)
    w_low = (weights - w_high.to(tl.float32)).to(tl.float16)
    x_high = states.to(tl.float16)
    x_low = (states - x_high.to(tl.float32)).to(tl.float16)
    product = tl.dot(x_high, w_high) + (tl.dot(x_low, w_high) + tl.dot(x_high, w_low))
    return product * x_unit * w_unit
