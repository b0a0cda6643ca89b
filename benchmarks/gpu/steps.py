"""A whole decoding step of a model with random weights, attention on codes, as one CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import linear, rms_norm, silu

from benchmarks.gpu.attention import kernels
from benchmarks.gpu.coded import Scheme, code_bytes, coded
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.timing import microseconds
from vqkv.kernels import using
from vqkv.kernels.attend.codes import Coded, attend_codes

SCHEMES = (Scheme(4), Scheme(4, rope=True), Scheme(8))


def steps(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Time, tokens a second and memory at each context and batch.

    Layers share one layer's codebooks and have codes and weights of their own. RoPE of the new
    token, the exact window and the append are left out: all are the same whatever the codes.
    """
    weights = [_layer(sizes) for _ in range(sizes.layers)]
    embedding = _random(sizes, sizes.vocabulary, sizes.hidden)
    for scheme, kernel in _arms(sizes):
        for context, batch in sizes.steps:
            layers = [coded(sizes, scheme, context, batch) for _ in range(sizes.layers)]
            hidden = _random(sizes, batch, sizes.hidden)

            def step(
                hidden: torch.Tensor = hidden,
                layers: list[Coded] = layers,
                scheme: Scheme = scheme,
            ) -> torch.Tensor:
                for weight, states in zip(weights, layers, strict=True):
                    hidden = _block(sizes, scheme, weight, hidden, states)
                return linear(hidden, embedding)

            with using(attend_codes=kernel):
                time = microseconds([step])
                finite = bool(step().isfinite().all())
            yield {
                "arm": scheme.name,
                "kernel": kernel,
                "context": context,
                "batch": batch,
                "us": time,
                "tokens_per_s": time and 1e6 * batch / time,
                "cache_bytes": sum(code_bytes(states) for states in layers),
                "finite": finite,
            }


def _arms(sizes: Sizes) -> Iterator[tuple[Scheme, str]]:
    for scheme in SCHEMES:
        for kernel in kernels(scheme.layout(sizes), sizes.device):
            yield scheme, kernel


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
    sizes: Sizes,
    scheme: Scheme,
    weight: dict[str, torch.Tensor],
    hidden: torch.Tensor,
    states: Coded,
) -> torch.Tensor:
    """One layer on `[B, hidden]`."""
    width = sizes.query_heads * sizes.head_dim
    normed = rms_norm(hidden, hidden.shape[-1:])
    query = linear(normed, weight["qkv"])[:, :width].view(len(hidden), -1, 1, sizes.head_dim)
    found = attend_codes(query * sizes.head_dim**-0.5, states, scheme.layout(sizes))
    hidden = hidden + linear(found.output.to(hidden.dtype).flatten(1), weight["output"])
    gate, up = linear(rms_norm(hidden, hidden.shape[-1:]), weight["gate_up"]).chunk(2, -1)
    return hidden + linear(silu(gate) * up, weight["down"])
