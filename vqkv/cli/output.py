"""What commands print: one JSON object, a table for people, or plain lines for pipes."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def fail(message: str, *, code: int = 2) -> NoReturn:
    """An error to stderr, nothing to stdout, and an exit code."""
    sys.stderr.write(f"error: {message}\n")
    raise typer.Exit(code)


def print_json(data: dict[str, Any]) -> None:
    """One JSON object on stdout. Figures that do not exist (NaN) become null."""
    sys.stdout.write(json.dumps(_finite(data), indent=2, allow_nan=False) + "\n")


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    title: str = "",
    *,
    piped_heads: bool = False,
) -> None:
    """A table on a terminal; elsewhere a line per row, tab-separated, nothing cut short.

    A terminal too narrow for the table gets a block for each row. With `piped_heads` the columns'
    heads are the first line elsewhere too: for tables of figures, which say nothing without them.
    """
    if not sys.stdout.isatty():
        for row in [columns, *rows] if piped_heads else rows:
            sys.stdout.write("\t".join(row) + "\n")
        return
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    console = Console()
    table = Table(*columns, title=title or None, title_justify="left")
    for row in rows:
        table.add_row(*row)
    unbounded = console.options.update(max_width=10_000)
    if Measurement.get(console, unbounded, table).minimum <= console.width:
        console.print(table)
        return
    for row in rows:
        _print_block(dict(zip(columns, row, strict=True)))
        sys.stdout.write("\n")


def print_facts(facts: dict[str, Any], title: str = "") -> None:
    """Names and values, a line each; in a pipe with a tab between them."""
    shown = {name: show(value) for name, value in facts.items()}
    if not sys.stdout.isatty():
        print_table(["", ""], list(shown.items()))
        return
    sys.stdout.write(f"{title}\n" if title else "")
    _print_block(shown)


def _print_block(shown: dict[str, str]) -> None:
    width = max(map(len, shown))
    for name, value in shown.items():
        sys.stdout.write(f"{name:{width}}  {value}\n")


def show(value: Any) -> str:
    """A value as a person reads it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {show(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(show(part) for part in value)
    return str(value)


def bytes_for_people(count: int) -> str:
    """Bytes in the unit that fits: `5.9 MB` (powers of ten)."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(name): _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value
