"""Nearest codewords: a prompt's worth at once, and what a decoding step appends."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.timing import microseconds
from vqkv.kernels import using
from vqkv.kernels.decode import decode
from vqkv.kernels.encode import encode, heads_triton
from vqkv.kernels.encode.heads import encode_heads
from vqkv.kernels.encode.joint import coupling, encode_joint
from vqkv.kernels.encode.pair import encode_pair
from vqkv.layouts import PAGE_TOKENS

#: (d, S)
SHAPES = ((2, 1), (4, 1), (8, 1), (8, 2))
APPENDS = (1, 16, 64)
CODEWORDS = 256
#: d of codes that are chosen together, and how often.
JOINT_DIMS, SWEEPS = (4, 8), 2


def encoding(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Ours and torch's, prefill-sized; ours for keys and values together, append-sized."""
    for dim, stages in SHAPES:
        for vectors in (sizes.prefill, *APPENDS):
            x, books = _problem(sizes, vectors, dim, stages)
            row = {"dim": dim, "stages": stages, "vectors": vectors * sizes.heads}
            if vectors != sizes.prefill:
                with using(encode_pair="triton"):
                    append = partial(encode_pair, x, books, x, books)
                    time, codes = microseconds([append]), append()[0]
                yield {**row, "arm": "append-pair", "us": time, "gap": _gap(x, books, codes)}
                continue
            for kernel in ("triton", "naive"):
                with using(encode=kernel):
                    time, codes = microseconds([partial(encode, x, books)]), encode(x, books)
                gap = _gap(x, books, codes)
                yield {**row, "arm": f"prefill-{kernel}", "us": time, "gap": gap}
    yield from _jointly(sizes)
    yield from _by_heads(sizes)


def _jointly(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Ours in one launch, and group by group with torch between the searches, for a prompt and for
    a page."""
    for dim in JOINT_DIMS:
        noise = torch.randn(sizes.heads, *2 * (sizes.head_dim,), device=sizes.device)
        # Little enough that the metric, with ones on its diagonal, is positive definite.
        metric = (0.25 * (noise + noise.mT) / sizes.head_dim**0.5).half()
        for vectors in (sizes.prefill, PAGE_TOKENS):
            x, books = _problem(sizes, vectors, dim, stages=1)
            x = x.float()  # as transforms leave it
            coupled = coupling(metric, dim)
            run = partial(encode_joint, x, books, coupled, SWEEPS)
            some = partial(encode_joint, x[:512], books, coupled, SWEEPS)
            with using(encode_joint="naive", encode="naive"):
                least = _cost(x, books, metric, some())
            for kernel in ("triton", "naive"):
                with using(encode_joint=kernel):
                    time, codes = microseconds([run], graph=kernel == "triton"), some()
                gap = _cost(x, books, metric, codes) / least - 1
                row = {"dim": dim, "stages": 1, "vectors": vectors * sizes.heads}
                yield {**row, "arm": f"joint-{kernel}", "us": time, "gap": gap}


def _by_heads(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """As `_jointly`, of heads whose errors are coupled."""
    heads, width = sizes.heads, sizes.head_dim
    noise = torch.randn(heads, width, heads, width, device=sizes.device)
    noise = 0.25 * (noise + noise.permute(2, 3, 0, 1)) / (heads * width) ** 0.5
    noise[range(heads), :, range(heads)] = 0
    coupled = noise.half()[None]
    for dim in JOINT_DIMS:
        for vectors in (sizes.prefill, PAGE_TOKENS):
            x, books = _problem(sizes, vectors, dim, stages=1)
            x = x.float()
            cost = partial(_cost, x, books, noise.view(1, heads * width, heads * width))
            run = partial(encode_heads, x, books, coupled, SWEEPS)
            some = partial(encode_heads, x[:512], books, coupled, SWEEPS)
            with using(encode_heads="naive", encode="naive"):
                least = cost(some())
            for kernel in ("triton", "naive"):
                # However many there are: long prompts are not left to ours.
                with using(encode_heads=kernel), patch.object(heads_triton, "MANY", 1 << 40):
                    time, codes = microseconds([run], graph=kernel == "triton"), some()
                row = {"dim": dim, "stages": 1, "vectors": vectors * heads}
                yield {**row, "arm": f"heads-{kernel}", "us": time, "gap": cost(codes) / least - 1}


def _problem(
    sizes: Sizes, vectors: int, dim: int, stages: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` `[N, M, d]` (fp16) of all heads, and codebooks `[M, S, K, d]`."""
    subvectors = sizes.heads * sizes.head_dim // dim
    x = torch.randn(vectors, subvectors, dim, device=sizes.device).half()
    books = torch.randn(subvectors, stages, CODEWORDS, dim, device=sizes.device)
    books /= torch.arange(1, stages + 1, device=sizes.device).view(1, -1, 1, 1)
    return x, books.half()


def _gap(x: torch.Tensor, books: torch.Tensor, codes: torch.Tensor) -> float:
    """By how much a squared distance exceeds the least of its stage, at most, in fp64."""
    some = min(512, x.shape[0])
    residual, gaps = x[:some].double(), []
    for stage, table in enumerate(books.double().unbind(1)):
        distances = (residual.unsqueeze(2) - table).square().sum(-1)
        code = codes[:some, :, stage, None].long()
        gaps.append(float((distances.gather(2, code)[..., 0] - distances.amin(2)).max()))
        residual -= table[torch.arange(len(table), device=x.device), code[..., 0]]
    return max(gaps)


def _cost(x: torch.Tensor, books: torch.Tensor, metric: torch.Tensor, codes: torch.Tensor) -> float:
    """Of the errors of codes of the first vectors in the metric, in fp64."""
    heads, dim = len(metric), x.shape[2]
    error = (decode(codes, books).double() - x[: len(codes)]).view(len(codes), heads, -1)
    group = torch.arange(metric.shape[1], device=x.device) // dim
    own = torch.eye(metric.shape[1], device=x.device).double()
    full = torch.where(group[:, None] == group, own, metric.double())
    return float(torch.einsum("nui,uij,nuj->", error, full, error))
