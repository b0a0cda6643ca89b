"""A whole decoding step of a model with random weights, attention on codes, as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear, rms_norm, silu

from benchmarks.gpu.attention import kernels
from benchmarks.gpu.coded import Scheme, code_bytes, coded
from benchmarks.gpu.exact import exact
from benchmarks.gpu.rest import kept
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.timing import microseconds
from vqkv.kernels import using
from vqkv.kernels.attend.codes import AttendLayout, Coded, attend_codes
from vqkv.kernels.attend.rest import Rest, attend_rest

SCHEMES = (
    Scheme(4),
    Scheme(4, rope=True),
    Scheme(4, rope=True, key_sums=True),
    Scheme(8),
    Scheme(8, rope=True, key_sums=True),
)
#: Attention of scaled queries on one layer's states.
Attend = Callable[[torch.Tensor], torch.Tensor]


def steps(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Time, tokens a second and memory at each context and batch.

    RoPE of the new token, its append, and the encoding of a page are left out.
    """
    weights = [_layer(sizes) for _ in range(sizes.layers)]
    embedding = _random(sizes, sizes.vocabulary, sizes.hidden)
    for context, batch in sizes.steps:
        hidden = _random(sizes, batch, sizes.hidden)
        for arm, kernel, layers, cache_bytes in _arms(sizes, context, batch):

            def step(hidden: torch.Tensor = hidden, layers: list[Attend] = layers) -> torch.Tensor:
                for weight, attend in zip(weights, layers, strict=True):
                    hidden = _block(sizes, weight, hidden, attend)
                return linear(hidden, embedding)

            asked = {"attend_codes": kernel, "attend_rest": "triton"} if arm != "fp16" else {}
            with using(**asked):
                time = microseconds([step])
                finite = bool(step().isfinite().all())
            yield {
                "arm": arm,
                "kernel": kernel,
                "context": context,
                "batch": batch,
                "us": time,
                "tokens_per_s": time and 1e6 * batch / time,
                "cache_bytes": cache_bytes,
                "finite": finite,
            }
            del layers, step  # what a generator makes next needs the room


def _arms(sizes: Sizes, context: int, batch: int) -> Iterator[tuple[str, str, list[Attend], int]]:
    """Names, kernels, attention of every layer, and bytes of all caches."""
    pairs = [
        [_random(sizes, batch, sizes.heads, context, sizes.head_dim) for _ in range(2)]
        for _ in range(sizes.layers)
    ]
    exact_layers: list[Attend] = [partial(_exact, keys, values) for keys, values in pairs]
    total = sum(x.nbytes for pair in pairs for x in pair)
    yield "fp16", "fp16-split-kv", exact_layers, total
    del pairs, exact_layers
    for scheme in SCHEMES:
        layout = scheme.layout(sizes)
        old = context - sizes.exact
        states = [
            (
                coded(sizes, scheme, old, batch)._replace(order=_queries_map(sizes)),
                kept(sizes, scheme, batch),
            )
            for _ in range(sizes.layers)
        ]
        layers = [partial(_on_codes, *each, layout) for each in states]
        total = sum(code_bytes(of) + _exact_bytes(rest) for of, rest in states)
        for kernel in kernels(layout, sizes.device):
            yield scheme.name, kernel, layers, total
        del states, layers


def _exact(keys: torch.Tensor, values: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    return exact(query.half(), keys, values)


def _on_codes(of: Coded, rest: Rest, layout: AttendLayout, query: torch.Tensor) -> torch.Tensor:
    """As a cache's layer does: queries in coded order, codes, then what is exact."""
    scaled = query.float()
    return attend_rest(scaled, attend_codes(scaled, of, layout), rest).to(query.dtype)


def _queries_map(sizes: Sizes) -> torch.Tensor:
    """The channel that each coded one is, `[H, D]`."""
    orders = [torch.randperm(sizes.head_dim, device=sizes.device) for _ in range(sizes.heads)]
    return torch.stack(orders)


def _exact_bytes(rest: Rest) -> int:
    return sum(states.nbytes for states in (*rest.sinks, *rest.tail))


def _layer(sizes: Sizes) -> dict[str, torch.Tensor]:
    queries, states = (count * sizes.head_dim for count in (sizes.query_heads, sizes.heads))
    return {
        "qkv": _random(sizes, queries + 2 * states, sizes.hidden),
        "output": _random(sizes, sizes.hidden, queries),
        "gate_up": _random(sizes, 2 * sizes.inner, sizes.hidden),
        "down": _random(sizes, sizes.hidden, sizes.inner),
    }


def _random(sizes: Sizes, *shape: int) -> torch.Tensor:
    """Scaled so that activations neither grow nor vanish."""
    return torch.randn(shape, device=sizes.device, dtype=torch.float16) * shape[-1] ** -0.5


def _block(
    sizes: Sizes, weight: dict[str, torch.Tensor], hidden: torch.Tensor, attend: Attend
) -> torch.Tensor:
    """One layer on `[B, hidden]`."""
    width = sizes.query_heads * sizes.head_dim
    normed = rms_norm(hidden, hidden.shape[-1:])
    query = linear(normed, weight["qkv"])[:, :width].view(len(hidden), -1, 1, sizes.head_dim)
    found = attend(query * sizes.head_dim**-0.5)
    hidden = hidden + linear(found.to(hidden.dtype).flatten(1), weight["output"])
    gate, up = linear(rms_norm(hidden, hidden.shape[-1:]), weight["gate_up"]).chunk(2, -1)
    return hidden + linear(silu(gate) * up, weight["down"])
