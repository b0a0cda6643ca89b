"""Run all parts and write one JSON file."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gpu.attention import attention
from benchmarks.gpu.capacity import capacity
from benchmarks.gpu.ceilings import ceilings
from benchmarks.gpu.encoding import encoding
from benchmarks.gpu.gathers import gathers
from benchmarks.gpu.rest import rest
from benchmarks.gpu.sizes import FULL, TOY
from benchmarks.gpu.steps import steps
from benchmarks.gpu.timing import gpu
from vqkv.provenance import write


def main() -> None:
    """Print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true", help="toy sizes in Triton's interpreter")
    parser.add_argument("--minutes", type=float, default=9.0, help="attention ends before this")
    arguments = parser.parse_args()
    sizes = TOY if arguments.dry else FULL
    torch.manual_seed(0)
    deadline = time.monotonic() + 60 * arguments.minutes

    figures: dict[str, Any] = {"dry": arguments.dry, "gpu_before": gpu()}
    figures["ceilings"] = ceilings(sizes)
    parts: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {
        "gathers": lambda: gathers(sizes),
        "encode": lambda: encoding(sizes),
        "rest": lambda: rest(sizes),
        "capacity": lambda: capacity(sizes),
        "step": lambda: steps(sizes),
        "attend": lambda: attention(sizes, lambda: time.monotonic() > deadline),
    }
    for name, part in parts.items():
        figures[name] = list(part())
        write(arguments.out, figures)  # what is measured stays, whatever the next part does
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    figures["complete"] = time.monotonic() <= deadline
    figures["gpu_after"] = gpu()
    write(arguments.out, figures)

    console = Console()
    for name in parts:
        rows = figures[name]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        table = Table(*columns, title=name)
        for row in rows:
            table.add_row(*(_cell(row.get(column)) for column in columns))
        console.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
