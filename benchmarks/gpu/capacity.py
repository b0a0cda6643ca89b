"""How many tokens fit beside a model's weights, in codes and in exact fp16 states."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.coded import Scheme, code_bytes, coded
from benchmarks.gpu.sizes import Sizes
from vqkv.layouts import PAGE_TOKENS

SCHEMES = (Scheme(2), Scheme(4), Scheme(8))


def capacity(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Bytes a token of real tensors, and tokens in the memory that is free beside the weights."""
    free = _free(sizes)
    exact = 4 * sizes.layers * sizes.heads * sizes.head_dim
    yield {"arm": "fp16", "bytes_per_token": exact, "tokens": free // exact}
    for scheme in SCHEMES:
        page = coded(sizes, scheme, PAGE_TOKENS, 1)
        per_token = sizes.layers * code_bytes(page) // PAGE_TOKENS
        tables = (plane.codewords for plane in (page.keys, page.values))
        books = sizes.layers * sum(table.nbytes for table in tables)
        yield {
            "arm": scheme.name,
            "bytes_per_token": per_token,
            "codebook_bytes": books,
            "tokens": (free - books) // per_token,
        }


def _free(sizes: Sizes) -> int:
    """Memory of the GPU less fp16 weights; of no meaning at toy sizes."""
    if sizes.device != "cuda":
        return 1 << 30
    widths = sizes.head_dim * (2 * sizes.query_heads + 2 * sizes.heads) + 3 * sizes.inner
    weights = 2 * sizes.hidden * (sizes.layers * widths + 2 * sizes.vocabulary)
    return torch.cuda.get_device_properties(0).total_memory - weights
