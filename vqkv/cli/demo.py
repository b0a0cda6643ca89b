"""`vqkv demo`: two presets on the demo model, from calibration to a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vqkv.cli.output import JsonFlag, print_facts, print_json, print_table
from vqkv.cli.progress import progress_bars


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("vqkv-demo"),
    json: JsonFlag = False,
) -> None:
    """Calibrate a 2-bit and a 1-bit preset, measure them, generate, and write a report."""
    from vqkv.demo import run_demo

    with progress_bars() as report:
        result = run_demo(out, progress=report)
    if json:
        print_json(result.to_dict())
        return
    title = "The demo model with compressed caches"
    print_table(result.columns, result.table(), title, piped_heads=True)
    print_facts({"report": out})
