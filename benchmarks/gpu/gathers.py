"""Codewords a clock that one multiprocessor gathers: what bounds every kernel that reads codes.

Predicted for fp16 codewords through L1 (codes a clock): lanes across tokens 10.2, 5.5 and 3.2 at
d = 2, 4 and 8; lanes across subspaces 4, 4 and 3.2. A kernel at the speed of memory needs 16.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.timing import gpu, microseconds

SUBSPACES, CODEWORDS, LANES = 32, 256, 128


@triton.jit
def gather(
    books, sums, rounds, subspaces: tl.constexpr, codewords: tl.constexpr, dim: tl.constexpr,
    across_tokens: tl.constexpr, lanes: tl.constexpr,
):  # fmt: skip
    """Each lane adds up `rounds` codewords; codes come from a generator in registers.

    Lanes of a warp read one subspace (across tokens) or each another (across subspaces).
    """
    lane = tl.program_id(0) * lanes + tl.arange(0, lanes)
    code = lane.to(tl.uint32) * 2654435761
    total = tl.zeros([lanes, dim], tl.float32)
    for step in range(rounds):
        code = code * 1664525 + 1013904223
        subspace = step % subspaces if across_tokens else (lane + step) % subspaces
        row = subspace * codewords + (code >> 24).to(tl.int32) % codewords
        found = tl.load(books + row[:, None] * dim + tl.arange(0, dim)[None, :])
        total += found.to(tl.float32)
    tl.store(sums + lane, tl.sum(total, 1))


def gathers(sizes: Sizes) -> list[dict[str, Any]]:
    """Of each width and order of lanes."""
    cuda = sizes.device == "cuda"
    processors = torch.cuda.get_device_properties(0).multi_processor_count if cuda else 1
    blocks = processors * 16 if cuda else 1
    rounds = max(1, sizes.gathers // (blocks * LANES))
    rows = []
    for dim in (2, 4, 8):
        books = torch.randn(SUBSPACES, CODEWORDS, dim, device=sizes.device).half()
        sums = torch.empty(blocks * LANES, device=sizes.device)
        for across_tokens in (True, False):

            def run(
                books: torch.Tensor = books,
                sums: torch.Tensor = sums,
                dim: int = dim,
                across_tokens: bool = across_tokens,
            ) -> None:
                gather[(blocks,)](
                    books, sums, rounds, SUBSPACES, CODEWORDS, dim, across_tokens, LANES,
                    num_warps=4,
                )  # fmt: skip

            time = microseconds([run])
            megahertz = float(gpu()["clocks.sm"].split()[0]) if cuda else None
            rows.append(
                {
                    "dim": dim,
                    "lanes": "tokens" if across_tokens else "subspaces",
                    "us": time,
                    "sm_mhz": megahertz,
                    "codes_per_clock": time
                    and rounds * blocks * LANES / processors / (time * (megahertz or 0)),
                }
            )
    return rows
