"""Attention on codes against dense attention on what the codes stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from vqkv.benchmarks.timing import Work, clock, medians, seconds
from vqkv.kernels.attend import codes_naive
from vqkv.kernels.attend.codes import Coded, Plane, Turns
from vqkv.kernels.native.attend import attend_codes
from vqkv.layouts import PAGE_TOKENS

#: Of Llama-3.1-8B.
QUERIES, HEADS, HEAD_DIM, ROPE_BASE = 32, 8, 128, 500000.0
CODEWORDS = 256


def attend_case(
    tokens: int, rope: str, dim: int, stages: int, threads: int, rounds: int
) -> dict[str, Any]:
    """One decode step of one layer, batch 1, against the fastest dense arm that we know.

    Dense arms read keys after RoPE, as caches hold them, in bf16 and in fp32: SDPA on a query head
    each, SDPA with the query heads of a KV head as rows, and two matrix products with those rows,
    keys lying by token or by channel. Errors are relative to attention in fp32 on the same codes.
    """
    query, coded = problem(tokens, rope, dim, stages)
    keys, values = dense(coded)
    truth = by_products(query, keys, values)
    now = clock(threads)
    name, arm = fastest_dense(query, keys, values, now)
    times = medians({"vqkv": lambda: attend_codes(query, coded), "dense": arm}, rounds, now)
    mine = attend_codes(query, coded).output
    return {
        "tokens": tokens,
        "rope": rope,
        "dim": dim,
        "stages": stages,
        "bits_per_value": 8 * stages / dim,
        "milliseconds": 1e3 * times["vqkv"],
        "attend_speedup_vs_best": times["dense"] / times["vqkv"],
        "best_baseline": name,
        "best_baseline_milliseconds": 1e3 * times["dense"],
        "attend_rel_rms": relative_rms(mine, truth),
        "best_baseline_rel_rms": relative_rms(arm().reshape(truth.shape), truth),
    }


def problem(tokens: int, rope: str, dim: int, stages: int) -> tuple[torch.Tensor, Coded]:
    """Queries `[1, Q, 1, D]`, scaled, whose scores have about unit variance, and random codes."""
    generator = torch.Generator().manual_seed(0)
    groups = HEAD_DIM // dim

    def plane() -> Plane:
        shape = (1, HEADS, tokens, groups * stages)
        codes = torch.randint(CODEWORDS, shape, generator=generator, dtype=torch.uint8)
        words = torch.randn(HEADS, groups, stages, CODEWORDS, dim, generator=generator)
        return Plane(codes, words * stages**-0.5)

    query = torch.randn(1, QUERIES, 1, HEAD_DIM, generator=generator) * HEAD_DIM**-0.5
    bounds = torch.tensor([[0], [tokens]], dtype=torch.int32)
    turns = _turns(tokens) if rope == "pre" else None
    return query, Coded(plane(), plane(), bounds[0], bounds[1], turns)


def dense(coded: Coded) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys after RoPE and values `[1, H, T, D]` in fp32, a head at a time for memory's sake."""
    streams: list[list[torch.Tensor]] = [[], []]
    for head in range(HEADS):
        one = slice(head, head + 1)
        for plane, vectors in zip((coded.keys, coded.values), streams, strict=True):
            mine = Plane(plane.codes[:, one], plane.codewords[one])
            vectors.append(codes_naive.decoded(mine))
        if coded.turns is not None:
            turns = coded.turns._replace(pairs=coded.turns.pairs[one])
            streams[0][-1] = codes_naive.rotated(streams[0][-1], turns)
    keys, values = (torch.cat(vectors, 1) for vectors in streams)
    return keys, values


def fastest_dense(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, now: Callable[[], float]
) -> tuple[str, Work]:
    """Of all arms in both types."""
    fastest: tuple[float, str, Work] | None = None
    for dtype in (torch.bfloat16, torch.float32):
        for name, arm in dense_arms(query, keys, values, dtype):
            arm()
            taken = min(seconds(arm, now) for _ in range(2))
            if fastest is None or taken < fastest[0]:
                fastest = (taken, name, arm)
    assert fastest is not None
    return fastest[1:]


def dense_arms(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, dtype: torch.dtype
) -> Iterator[tuple[str, Work]]:
    """Names and functions; each holds its tensors only as long as it is held."""
    kind = str(dtype).removeprefix("torch.")
    q, k, v = query.to(dtype), keys.to(dtype), values.to(dtype)
    rows = q.view(1, HEADS, QUERIES // HEADS, HEAD_DIM)
    yield (
        f"sdpa, enable_gqa, {kind}",
        lambda: scaled_dot_product_attention(q, k, v, scale=1.0, enable_gqa=True),
    )
    yield (
        f"sdpa, queries as rows, {kind}",
        lambda: scaled_dot_product_attention(rows, k, v, scale=1.0),
    )
    yield f"products, {kind}", lambda: by_products(q, k, v)
    turned = k.transpose(2, 3).contiguous().transpose(2, 3)
    yield f"products, keys by channel, {kind}", lambda: by_products(q, turned, v)


def by_products(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attention `[1, Q, 1, D]` by two matrix products."""
    rows = query.view(1, HEADS, QUERIES // HEADS, HEAD_DIM)
    return ((rows @ keys.transpose(2, 3)).softmax(-1) @ values).view(query.shape)


def relative_rms(found: torch.Tensor, truth: torch.Tensor) -> float:
    """RMS of the difference over that of the truth."""
    gap = (found.double() - truth.double()).square().mean()
    return float((gap / truth.double().square().mean()).sqrt())


def _turns(tokens: int) -> Turns:
    half = HEAD_DIM // 2
    frequency = ROPE_BASE ** -(torch.arange(half).double() / half)

    def table(positions: torch.Tensor) -> torch.Tensor:
        angles = positions.double().unsqueeze(-1) * frequency
        return torch.stack([angles.cos(), angles.sin()], -1).float()

    starts = torch.arange(0, tokens, PAGE_TOKENS)
    pairs = torch.arange(half, dtype=torch.int32).expand(HEADS, half).contiguous()
    return Turns(table(starts)[None], table(torch.arange(PAGE_TOKENS)), pairs)
