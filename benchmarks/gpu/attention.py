"""Attention of one token's queries on a context: codes against exact fp16 states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.coded import Scheme, code_bytes, coded
from benchmarks.gpu.exact import exact
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.timing import copies, microseconds
from vqkv.kernels import using
from vqkv.kernels.attend.codes import AttendLayout, Coded, Plane, attend_codes
from vqkv.kernels.attend.codes_naive import decoded, rotated
from vqkv.kernels.cuda.tables import as_read
from vqkv.kernels.select import KERNELS

SCHEMES = (
    Scheme(4),
    Scheme(4, paged=True),
    Scheme(4, skewed=True),
    Scheme(4, rope=True),
    Scheme(4, rope=True, key_sums=True),
    Scheme(8),
    Scheme(8, rope=True),
    Scheme(8, rope=True, key_sums=True),
    Scheme(8, stages=2),
    Scheme(2),
)
#: Contexts and batches at which FlexAttention is compiled, which takes it seconds each.
FLEX_POINTS = ((1 << 17, 1),)

Exact = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def attention(sizes: Sizes, out_of_time: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """Each arm at each context and batch, until the time is up."""
    for context, batch in sizes.points():
        arms = [
            partial(on_codes, sizes, scheme, kernel, context, batch)
            for scheme in SCHEMES
            for kernel in kernels(scheme.layout(sizes), sizes.device)
        ]
        arms.append(partial(exactly, sizes, context, batch))
        for arm in arms:
            if out_of_time():
                return
            yield from arm()


def kernels(layout: AttendLayout, device: str) -> list[str]:
    """Ours that read a layout there."""
    ours = {name: KERNELS.get(f"attend_codes.{name}") for name in ("triton", "cuda")}
    return [name for name, k in ours.items() if k.refuses(layout, torch.device(device)) is None]


def _queries(sizes: Sizes, batch: int) -> torch.Tensor:
    shape = (batch, sizes.query_heads, 1, sizes.head_dim)
    return torch.randn(shape, device=sizes.device) * sizes.head_dim**-0.5


def on_codes(
    sizes: Sizes, scheme: Scheme, kernel: str, context: int, batch: int
) -> Iterator[dict[str, Any]]:
    query, layout = _queries(sizes, batch), scheme.layout(sizes)
    first = coded(sizes, scheme, context, batch)
    count = copies(code_bytes(first), sizes.cold_bytes)
    sets = [first] + [coded(sizes, scheme, context, batch) for _ in range(count - 1)]
    with using(attend_codes=kernel):
        time = microseconds([partial(attend_codes, query, each, layout) for each in sets])
        found = attend_codes(query, first, layout)
    keys, output = _truth(query, _as_read(first) if kernel == "cuda" else first)
    errors = [_relative(found.output[:1, :1], output)]
    if found.key_mean is not None:
        errors.append(_relative(found.key_mean[:1, :1], keys))
    yield {
        "arm": scheme.name,
        "kernel": kernel,
        "codebooks": "fp8" if kernel == "cuda" else "fp16",
        "context": context,
        "batch": batch,
        "us": time,
        "code_bytes": code_bytes(first),
        "gb_per_s": time and 1e-3 * code_bytes(first) / time,
        "error": max(errors),
    }


def _as_read(of: Coded) -> Coded:
    """With codewords rounded to fp8: what the kernel is given to be right about."""
    keys, values = (
        plane._replace(codewords=as_read(plane.codewords)) for plane in (of.keys, of.values)
    )
    return of._replace(keys=keys, values=values)


def _truth(query: torch.Tensor, of: Coded) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted means of keys before RoPE and of values, of the first head of the first row."""

    def first_head(plane: Plane) -> Plane:
        codes = plane.codes[:, :1] if of.pages is not None else plane.codes[:1, :1]
        return Plane(codes, plane.codewords[:1])

    pages = None if of.pages is None else of.pages[:1]
    keys, values = (decoded(first_head(plane), pages) for plane in (of.keys, of.values))
    turned = keys
    if of.turns is not None:
        turned = rotated(keys, of.turns._replace(pairs=of.turns.pairs[:1]))
    keys, values, turned = (x[:, :, : int(of.stop[0])] for x in (keys, values, turned))
    weights = _weights(query[:1, :1], turned)
    return weights @ keys.double(), weights @ values.double()


def _weights(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return (query.double() @ keys.double().transpose(2, 3)).softmax(-1)


def _relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def exactly(sizes: Sizes, context: int, batch: int) -> Iterator[dict[str, Any]]:
    query = _queries(sizes, batch)
    shape = (batch, sizes.heads, context, sizes.head_dim)
    size = 4 * batch * sizes.heads * context * sizes.head_dim
    sets = [
        tuple(torch.randn(shape, device=sizes.device, dtype=torch.float16) for _ in range(2))
        for _ in range(copies(size, sizes.cold_bytes))
    ]
    keys, values = (x[:1, :1] for x in sets[0])
    truth = _weights(query[:1, :1], keys) @ values.double()
    for name, run in _baselines(sizes, context, batch).items():
        try:
            time = microseconds([partial(run, query.half(), *each) for each in sets])
            error = _relative(run(query.half(), *sets[0])[:1, :1], truth)
        except RuntimeError as failure:  # a backend that does not take this shape says so
            yield {"arm": name, "context": context, "batch": batch, "refused": str(failure)[:200]}
            continue
        yield {
            "arm": name,
            "context": context,
            "batch": batch,
            "us": time,
            "state_bytes": size,
            "gb_per_s": time and 1e-3 * size / time,
            "error": error,
        }


def _baselines(sizes: Sizes, context: int, batch: int) -> dict[str, Exact]:
    arms: dict[str, Exact] = {"fp16-split-kv": exact}
    if sizes.device != "cuda":
        return arms | {"sdpa-math": partial(_sdpa, SDPBackend.MATH)}
    arms["sdpa-flash"] = partial(_sdpa, SDPBackend.FLASH_ATTENTION)
    arms["sdpa-cudnn"] = partial(_sdpa, SDPBackend.CUDNN_ATTENTION)
    if (context, batch) in FLEX_POINTS:
        from torch.nn.attention.flex_attention import flex_attention

        arms["flex"] = partial(torch.compile(flex_attention), scale=1.0, enable_gqa=True)
    return arms


def _sdpa(
    backend: SDPBackend, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    with sdpa_kernel(backend):
        return torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, scale=1.0, enable_gqa=True
        )
