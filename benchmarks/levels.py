"""Attention on codes at each SIMD level that this CPU has, beside the fastest dense arm.

    python -m benchmarks.levels --out benchmarks/results/cpu-levels-NAME.json

The cases of `vqkv bench cpu`, one thread; arms in turn, medians. For CPUs with AVX2. What a CPU
that has no more than AVX2 would do, on one that has:

    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \\
        python -m benchmarks.levels --most avx2 --out benchmarks/results/cpu-levels-NAME-avx2.json
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vqkv.benchmarks.attend import by_products, dense, fastest_dense, problem, relative_rms
from vqkv.benchmarks.cpu import ATTEND
from vqkv.benchmarks.timing import Work, clock, medians
from vqkv.errors import KernelError
from vqkv.kernels import native
from vqkv.kernels.attend.codes import Coded, Partial
from vqkv.kernels.native.attend import attend_codes
from vqkv.provenance import write

ROUNDS = 31
LEVELS: tuple[native.Level, ...] = ("avx2", "avx512", "avx512_vbmi", "avx512_vnni")
#: By which torch and the libraries that multiply for it are told to do without what a CPU has.
VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def levels(most: native.Level) -> list[native.Level]:
    """Of `LEVELS` up to `most`, those that this CPU has.

    Raises:
        KernelError: the kernels are stale.
    """
    found: list[native.Level] = []
    native.simd_level()
    for level in LEVELS[: LEVELS.index(most) + 1]:
        with contextlib.suppress(KernelError), native.forced_level(level):
            found.append(level)
    return found


def at_level(level: native.Level, query: torch.Tensor, coded: Coded) -> Partial:
    """Attention by the kernel of a level."""
    with native.forced_level(level):
        return attend_codes(query, coded)


def measure(
    arms: list[native.Level], tokens: int, rope: str, dim: int, stages: int
) -> dict[str, Any]:
    """Milliseconds of each level and of the dense arm, and the levels' errors."""
    query, coded = problem(tokens, rope, dim, stages)
    keys, values = dense(coded)
    truth = by_products(query, keys, values)
    now = clock(1)
    name, arm = fastest_dense(query, keys, values, now)
    works: dict[str, Work] = {}
    errors: dict[str, float] = {}
    for level in arms:
        errors[level] = relative_rms(at_level(level, query, coded).output, truth)
        works[level] = functools.partial(at_level, level, query, coded)
    times = medians({**works, name: arm}, ROUNDS, now)
    return {
        **{"tokens": tokens, "rope": rope, "dim": dim, "stages": stages, "dense": name},
        "milliseconds": {level: 1e3 * taken for level, taken in times.items()},
        "rel_rms": errors,
    }


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--most", choices=LEVELS, default=LEVELS[-1], help="the highest level")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arms = levels(arguments.most)
    if not arms:
        parser.error(f"this CPU has no level above {native.simd_level()}")
    torch.set_num_threads(1)
    rows = [measure(arms, *case) for case in track(ATTEND, "cases", transient=True)]
    best = arms[-1]
    if arguments.out is not None:
        environment = {name: os.environ[name] for name in VARIABLES if name in os.environ}
        found = {"best_level": best, "environment": environment, "rounds": ROUNDS, "rows": rows}
        write(arguments.out, found)
    table = Table("case", *arms, "dense", f"dense / {best}", title="milliseconds")
    for row in rows:
        times = row["milliseconds"]
        case = f"{row['tokens']:,} {row['rope']}-RoPE d={row['dim']} S={row['stages']}"
        cells = (f"{times[level]:.2f}" for level in [*arms, row["dense"]])
        table.add_row(case, *cells, f"{times[row['dense']] / times[best]:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
