"""Compile the CUDA kernel's variants without a GPU and report what they issue, as JSON.

    python -m tests.kernels.offline_cuda > tests/kernels/budgets-cuda.json

renews the budgets that `tests/kernels/test_offline.py` holds them to.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.kernels.multiprocessor import clocks_a_token
from tests.kernels.offline import disassembled
from vqkv.kernels.cuda.build import compiled
from vqkv.kernels.cuda.configs import (
    FEW_PAGES,
    HOPPER,
    SOME_PAGES,
    AttendVariant,
    MergeVariant,
)

#: Tokens of a tile; a warp reads one or two in a pass through its loop.
TILE = 16


def variant(
    head_dim: int, dim: int, rows: int = 4, *, paged: bool = False, rope: bool = False,
    key_sums: bool = False, most_pages: int | None = None,
) -> AttendVariant:  # fmt: skip
    """Codes of a token right after those of the one before it."""
    width = head_dim // dim
    return AttendVariant(head_dim, dim, rows, width, width, rope, key_sums, paged, most_pages)


VARIANTS = {
    "attend/128/d4": variant(128, 4),
    "attend/128/d4/some-pages": variant(128, 4, most_pages=SOME_PAGES),
    "attend/128/d4/few-pages": variant(128, 4, most_pages=FEW_PAGES),
    "attend/128/d4/rope/key-sums/few-pages": variant(
        128, 4, rope=True, key_sums=True, most_pages=FEW_PAGES
    ),
    "attend/128/d4/paged": variant(128, 4, paged=True),
    "attend/128/d4/rope": variant(128, 4, rope=True),
    "attend/128/d4/rope/paged": variant(128, 4, rope=True, paged=True),
    "attend/128/d4/rope/key-sums": variant(128, 4, rope=True, key_sums=True),
    "attend/128/d4/8-rows": variant(128, 4, 8),
    "attend/128/d4/rope/8-rows": variant(128, 4, 8, rope=True),
    "attend/128/d4/rope/key-sums/8-rows": variant(128, 4, 8, rope=True, key_sums=True),
    "attend/128/d8/8-rows": variant(128, 8, 8),
    "attend/128/d4/16-rows": variant(128, 4, 16),
    "attend/128/d4/rope/key-sums/16-rows": variant(128, 4, 16, rope=True, key_sums=True),
    "attend/128/d8": variant(128, 8),
    "attend/128/d8/rope": variant(128, 8, rope=True),
    "attend/128/d8/rope/key-sums": variant(128, 8, rope=True, key_sums=True),
    "attend/64/d4/rope/key-sums": variant(64, 4, rope=True, key_sums=True),
    "attend/64/d8/rope/key-sums": variant(64, 8, rope=True, key_sums=True),
}


def report(one: AttendVariant) -> dict[str, Any]:
    """What a variant holds and issues.

    Instructions are of a warp, for one token of one head, in a pass that scales no sums down and
    masks no token. Turning queries, once a page, is not among them. Clocks are a model's.
    """
    cubin = compiled("attend.cu", one.macros(), HOPPER)
    sass, registers = disassembled(cubin)
    usual, _ = disassembled(compiled("attend.cu", (*one.macros(), ("WITHOUT_SELDOM", 1)), HOPPER))
    return {
        "instructions": round(len(usual.inner_loop) / (TILE * one.tiles), 1),
        "clocks": round(clocks_a_token(cubin, one.warps, one.tiles, one.chunk), 1),
        "registers": registers,
        "shared_bytes": one.shared_bytes,
        "spills_in_loop": sum(i.starts("LDL", "STL") for i in sass.inner_loop),
        "unset_uniforms": sass.unset_uniforms,
        "matrix": sum(i.starts("HMMA") for i in usual.inner_loop) // one.tiles,
        "look_ups": sum(i.starts("IDP") for i in usual.inner_loop) // one.tiles,
    }


def main() -> None:
    """Print reports by name."""
    from cuda.bindings import nvrtc

    for key_sums in (False, True):  # small, without a budget
        compiled("merge.cu", MergeVariant(128, key_sums).macros(), HOPPER)
    _, major, minor = nvrtc.nvrtcVersion()
    reports = {name: report(one) for name, one in VARIANTS.items()}
    json.dump({"nvrtc": f"{major}.{minor}", f"sm_{HOPPER}": reports}, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
