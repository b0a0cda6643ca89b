"""Decoding speed on the demo model, context really filled: exact caches against a compressed one.

    vqkv calibrate demo --scheme fast-2bit --text ... --out ARTEFACT
    python benchmarks/demo_speed.py ARTEFACT

Steps of all caches are taken in turn, each one token further, and the medians compared.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, StaticCache

from vqkv.cache import attach
from vqkv.compressor import KVCompressor
from vqkv.models import load_model
from vqkv.provenance import write

OUT = Path(__file__).parent / "results" / "demo-speed.json"
CONTEXTS = (4096, 8000)  # the model has 8,192 positions
STEPS, WARM_UP = 20, 4
CHUNK = 512


@torch.inference_mode()
def measured(compressor: KVCompressor, dtype: torch.dtype, context: int) -> dict[str, Any]:
    """Median milliseconds of a step with each cache."""
    model: Any = load_model("demo")[0].to(dtype)
    steps = STEPS + WARM_UP
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 40000, (1, context + steps), generator=generator)
    with attach(model, compressor) as attached:
        caches = {
            "dynamic": DynamicCache(config=model.config),
            "static": StaticCache(config=model.config, max_cache_len=context + steps),
            "compressed": attached.new_cache(),
        }
        read = attached.read
    spent: dict[str, list[float]] = {name: [] for name in caches}

    def forward(name: str, part: torch.Tensor) -> None:
        around = attach(model, compressor) if name == "compressed" else nullcontext()
        with around:
            start = time.perf_counter()
            model(part, past_key_values=caches[name], logits_to_keep=1)
            spent[name].append(1000 * (time.perf_counter() - start))

    for name in caches:
        for part in ids[:, :context].split(CHUNK, 1):
            forward(name, part)
        spent[name].clear()
    for part in ids[:, context:].split(1, 1):
        for name in caches:
            forward(name, part)
    steps_ms = {name: median(times[WARM_UP:]) for name, times in spent.items()}
    exact = min(steps_ms["dynamic"], steps_ms["static"])
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "context": context,
        "read": read,
        **{f"{name}_ms": ms for name, ms in steps_ms.items()},
        "tokens_per_second": 1000 / steps_ms["compressed"],
        "tokens_per_second_exact": 1000 / exact,
        "speedup": exact / steps_ms["compressed"],
    }


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artefact", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    compressor = KVCompressor.from_pretrained(arguments.artefact)
    rows = [
        measured(compressor, dtype, context)
        for dtype in (torch.float32, torch.bfloat16)
        for context in CONTEXTS
    ]
    table = Table(*rows[0], title=f"{compressor.scheme.name}: a decoding step, batch 1")
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)
    write(arguments.out, {"scheme": compressor.scheme.name, "steps": STEPS, "rows": rows})


if __name__ == "__main__":
    main()
