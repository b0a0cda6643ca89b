"""Attention in CUDA C++ by how many warps a block has, and how many tiles a warp reads at a time.

    python -m benchmarks.gpu.variants --out benchmarks/results/gpu-h200-variants.json

What it finds is for `warps` and `tiles` of `vqkv/kernels/cuda/configs.py`; nothing is
tuned at run time. Compiled beforehand, side by side; takes half a minute of an H100 or H200.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gpu import attention
from benchmarks.gpu.coded import Scheme
from benchmarks.gpu.sizes import FULL
from benchmarks.gpu.timing import gpu
from vqkv.kernels.cuda import build
from vqkv.kernels.cuda.configs import HOPPER, AttendVariant
from vqkv.provenance import write

#: Contexts and batches.
POINTS = ((1 << 17, 16), (1 << 17, 1), (1 << 12, 64), (1 << 12, 1), (1 << 11, 1), (1 << 10, 1))
SCHEMES = tuple(
    Scheme(dim, rope=rope, key_sums=sums)
    for dim in (4, 8)
    for rope, sums in ((False, False), (True, False), (True, True))
)
#: Warps and tiles.
CHOICES = ((8, 1), (8, 2), (12, 1), (12, 2), (16, 1))


@contextmanager
def chosen(warps: int, tiles: int) -> Iterator[None]:
    """With these instead of what the rules say."""
    with (
        patch.object(AttendVariant, "warps", warps),
        patch.object(AttendVariant, "tiles", tiles),
    ):
        yield


def compile_all() -> None:
    """Side by side: each takes seconds."""
    jobs = []
    for scheme in SCHEMES:
        width = FULL.head_dim // scheme.dim
        shape = (FULL.head_dim, scheme.dim, FULL.group, width, width)
        for choice in CHOICES:
            with chosen(*choice):
                jobs.append(AttendVariant(*shape, scheme.rope, scheme.key_sums).macros())
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda macros: build.compiled("attend.cu", macros, HOPPER), jobs))


def rows() -> Iterator[dict[str, Any]]:
    """Exact attention, and each scheme by each choice, at each point."""
    for context, batch in POINTS:
        yield from attention.exactly(FULL, context, batch)
        for scheme in SCHEMES:
            for warps, tiles in CHOICES:
                with chosen(warps, tiles):
                    run = partial(attention.on_codes, FULL, scheme, "cuda", context, batch)
                    yield from ({**row, "warps": warps, "tiles": tiles} for row in run())
        torch.cuda.empty_cache()


def main() -> None:
    """Print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    compile_all()
    before = gpu()
    found = list(rows())
    write(arguments.out, {"gpu_before": before, "attend": found})
    columns = ("arm", "context", "batch", "warps", "tiles", "us", "error")
    table = Table(*columns)
    for row in found:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    Console().print(table)


if __name__ == "__main__":
    main()
