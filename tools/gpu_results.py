"""What `make bench-gpu` measured, as tables of a page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
END = "<!-- end -->"
#: Arms of attention that have a column of their own, by kernel.
COLUMNS = {
    "cuda": ("d4", "d4-rope", "d4-rope-key-sums", "d8", "d8-rope", "d8-rope-key-sums"),
    "triton": ("d4", "d4-rope", "d8", "d8-x2", "d2"),
}
STEPS = ("d4", "d4-rope-key-sums", "d8", "d8-rope-key-sums")


def with_gpu_results(page: str) -> str:
    """The page with all tables of a file after each line `<!-- gpu: FILE -->`."""

    def replaced(match: re.Match[str]) -> str:
        data = json.loads((RESULTS / match.group(1)).read_text(encoding="utf-8"))
        return "\n\n".join([f"<!-- gpu: {match.group(1)} -->", *_parts(data), END])

    pattern = rf"<!-- gpu: (\S+) -->(?:(?:(?!<!--).)*{re.escape(END)})?"
    return re.sub(pattern, replaced, page, flags=re.DOTALL)


def _parts(data: dict[str, Any]) -> Iterable[str]:
    ceilings, versions, gpu = data["ceilings"], data["versions"], data["gpu_after"]
    yield (
        f"{gpu['name']}, driver {gpu['driver_version']}, torch {versions['torch']}, Triton "
        f"{versions['triton']}, at commit `{data['commit'][:7]}`. A copy moves "
        f"{ceilings['copy_gb_per_s']:,.0f} GB/s, read and written bytes both counted; an fp16 "
        f"product runs at {ceilings['product_tflop_per_s']:.0f} TFLOP/s."
    )
    yield "### Attention of one token"
    yield (
        "µs of the fastest exact fp16 kernel of those measured, the part of the copy's GB/s that "
        "it reads its states at, and how many times as fast ours are."
    )
    yield _attention(data)
    yield "### A decoding step"
    yield "Tokens a second of the whole batch, attention in CUDA."
    yield _steps(data["step"])
    yield "### Encoding"
    yield (
        "One stream of one layer for a prompt of 131,072 tokens, 8 heads; and keys and values of "
        "one token a sequence, in one launch."
    )
    yield _encoding(data["encode"])
    yield "### Look-ups through L1"
    yield "Codewords a clock that a multiprocessor reads in Triton, by what lanes lie across."
    yield _table(
        ("d", "tokens", "subspaces"),
        [
            (row["dim"], row["codes_per_clock"], other["codes_per_clock"])
            for row, other in zip(data["gathers"][::2], data["gathers"][1::2], strict=True)
        ],
    )
    yield "### Memory"
    yield "Bytes a token of all layers, and the tokens that fit beside fp16 weights."
    rows = [(row["arm"], row["bytes_per_token"], row["tokens"]) for row in data["capacity"]]
    yield _table(("", "bytes a token", "tokens"), rows)


def _attention(data: dict[str, Any]) -> str:
    points: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in data["attend"]:
        points.setdefault((row["context"], row["batch"]), []).append(row)
    names = [f"{arm}, {kernel}" for kernel, arms in COLUMNS.items() for arm in arms]
    lines = []
    complete = {p: rows for p, rows in points.items() if _complete(rows)}
    for point, rows in sorted(complete.items()):
        exact = [row for row in rows if "state_bytes" in row]
        best = min(exact, key=lambda row: row["us"])
        ours = {(row["kernel"], row["arm"]): row["us"] for row in rows if "kernel" in row}
        of_copy = best["gb_per_s"] / data["ceilings"]["copy_gb_per_s"]
        ratios = [
            f"{best['us'] / ours[kernel, arm]:.2f}"
            for kernel, arms in COLUMNS.items()
            for arm in arms
        ]
        lines.append((*point, f"{best['us']:.1f} ({best['arm']})", f"{of_copy:.0%}", *ratios))
    return _table(("context", "batch", "fp16, µs", "of copy", *names), lines)


def _complete(rows: list[dict[str, Any]]) -> bool:
    """Whether time did not run out at this context and batch: exact arms come last."""
    return any("state_bytes" in row for row in rows)


def _steps(rows: list[dict[str, Any]]) -> str:
    found = {(row["context"], row["batch"], row["kernel"], row["arm"]): row for row in rows}
    lines = []
    for context, batch in dict.fromkeys((row["context"], row["batch"]) for row in rows):
        exact = found[context, batch, "fp16-split-kv", "fp16"]["tokens_per_s"]
        speeds = [found[context, batch, "cuda", arm]["tokens_per_s"] for arm in STEPS]
        ours = [f"{speed:,.0f} ({speed / exact:.2f}×)" for speed in speeds]
        lines.append((context, batch, f"{exact:,.0f}", *ours))
    return _table(("context", "batch", "fp16 (`fp16-split-kv`)", *STEPS), lines)


def _encoding(rows: list[dict[str, Any]]) -> str:
    lines = []
    for dim, stages in dict.fromkeys((row["dim"], row["stages"]) for row in rows):
        mine = [row for row in rows if (row["dim"], row["stages"]) == (dim, stages)]
        prefill = {row["arm"]: row["us"] for row in mine}
        ours, torch = prefill["prefill-triton"], prefill["prefill-naive"]
        appends = [row["us"] for row in mine if row["arm"] == "append-pair"]
        times = (f"{1e-3 * ours:.2f}", f"{torch / ours:.0f}×", *(f"{us:.1f}" for us in appends))
        lines.append((dim, stages, *times))
    head = ("prompt, ms", "over torch", "append at batch 1, µs", "at 16", "at 64")
    return _table(("d", "stages", *head), lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ("---",) * len(head), *(tuple(map(_cell, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
