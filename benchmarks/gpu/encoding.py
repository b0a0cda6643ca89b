"""Nearest codewords: a prompt's worth at once, and what a decoding step appends."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.timing import microseconds
from vqkv.kernels import using
from vqkv.kernels.encode import encode
from vqkv.kernels.encode.pair import encode_pair

#: (d, S)
SHAPES = ((2, 1), (4, 1), (8, 1), (8, 2))
APPENDS = (1, 16, 64)
CODEWORDS = 256


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
