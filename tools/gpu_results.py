"""What `make bench-gpu` measured, as tables of a page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
END = "<!-- end -->"
#: Presets whose layers are read as an arm's are.
PRESETS = {"d4-rope-key-sums": "`fast-2bit`", "d8-rope-key-sums": "`fast-1bit`"}
#: Columns of tables of attention, by kernel.
COLUMNS = {
    "cuda": (*PRESETS, "d4-rope", "d8-rope", "d4", "d8"),
    "triton": ("d4", "d4-rope", "d8", "d8-x2", "d2"),
}
#: Batches of the table of Triton, in which nothing else changes much.
TRITON_BATCHES = (1, 16)
STEPS = (*PRESETS, "d4", "d8")


def with_gpu_results(page: str) -> str:
    """The page with all tables of a file after each line `<!-- gpu: FILE -->`, and those of a
    decoding step after each line `<!-- gpu-steps: FILE -->`."""

    def replaced(match: re.Match[str]) -> str:
        kind, file = match.groups()
        data = json.loads((RESULTS / file).read_text(encoding="utf-8"))
        parts = _parts(data) if kind == "gpu" else _steps_alone(data)
        return "\n\n".join([f"<!-- {kind}: {file} -->", *parts, END])

    pattern = rf"<!-- (gpu|gpu-steps): (\S+) -->(?:(?:(?!<!--).)*{re.escape(END)})?"
    return re.sub(pattern, replaced, page, flags=re.DOTALL)


def _steps_alone(data: dict[str, Any]) -> Iterable[str]:
    """Of a run whose other figures are out of date."""
    yield (
        f"At commit `{data['commit'][:7]}`, on an {data['gpu_before']['name']}: tokens a second of "
        "the whole batch, attention in CUDA."
    )
    yield _steps(data["step"])


def _parts(data: dict[str, Any]) -> Iterable[str]:
    ceilings, versions, gpu = data["ceilings"], data["versions"], data["gpu_after"]
    yield (
        f"{gpu['name']}, driver {gpu['driver_version']}, torch {versions['torch']}, Triton "
        f"{versions['triton']}, at commit `{data['commit'][:7]}`. A copy moves "
        f"{ceilings['copy_gb_per_s']:,.0f} GB/s, read and written bytes both counted; an fp16 "
        f"product runs at {ceilings['product_tflop_per_s']:.0f} TFLOP/s."
    )
    yield "### Attention of one token, in CUDA C++"
    yield (
        "How long the fastest exact fp16 kernel takes of those measured, and at which part of the "
        "copy's GB/s it reads its states; and how many times as fast ours are, **bold** where "
        "faster."
    )
    yield _attention(data, "cuda")
    yield "### Attention of one token, in Triton"
    yield "The same, at some batches, for what CUDA C++ does not read, and for what it does."
    yield _attention(data, "triton")
    if "step" in data:
        yield "### A decoding step"
        yield "Tokens a second of the whole batch, attention in CUDA."
        yield _steps(data["step"])
    if "rest" in data:
        yield "### Exact tokens taken in"
        yield (
            "What follows attention on codes in a layer of `fast-2bit` or `fast-1bit`: sums mapped "
            f"back, and attention on {data['rest'][0]['tokens']} exact tokens, in µs."
        )
        yield _rest(data["rest"])
    yield "### Encoding"
    yield (
        "One stream of one layer for a prompt of 131,072 tokens, 8 heads; and keys and values of "
        "one token a sequence, in one launch."
    )
    yield _encoding(data["encode"])
    for arm, stream in (("joint", "keys"), ("heads", "values")):
        if any(row["arm"].startswith(arm) for row in data["encode"]):
            yield (
                f"Codes chosen together, as {stream} of `fast-2bit` (d = 4) and `fast-1bit` "
                "(d = 8) are; how many times as fast as with torch between searches."
            )
            yield _together(data["encode"], arm)
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
    yield (
        "Bytes a token of all layers, and the tokens that would fit into this card's memory less "
        "16 GB of weights, with nothing else in it."
    )
    rows = [(row["arm"], row["bytes_per_token"], row["tokens"]) for row in data["capacity"]]
    yield _table(("", "bytes a token", "tokens"), rows)


def _attention(data: dict[str, Any], kernel: str) -> str:
    points: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in data["attend"]:
        points.setdefault((row["context"], row["batch"]), []).append(row)
    lines = []
    for (context, batch), rows in sorted(points.items()):
        if not _complete(rows) or (kernel == "triton" and batch not in TRITON_BATCHES):
            continue
        best = min((row for row in rows if "state_bytes" in row), key=lambda row: row["us"])
        ours = {row["arm"]: row["us"] for row in rows if row.get("kernel") == kernel}
        of_copy = best["gb_per_s"] / data["ceilings"]["copy_gb_per_s"]
        ratios = [best["us"] / ours[arm] for arm in COLUMNS[kernel]]
        cells = [f"**{ratio:.2f}×**" if ratio > 1 else f"{ratio:.2f}×" for ratio in ratios]
        exact = f"{best['us']:.1f} µs (`{best['arm']}`)"
        lines.append((context, batch, exact, f"{of_copy:.0%}", *cells))
    names = [PRESETS.get(arm, arm) if kernel == "cuda" else arm for arm in COLUMNS[kernel]]
    return _table(("context", "batch", "fp16", "of copy", *names), lines)


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
    return _table(
        ("context", "batch", "fp16 (`fp16-split-kv`)", *(PRESETS.get(arm, arm) for arm in STEPS)),
        lines,
    )


def _rest(rows: list[dict[str, Any]]) -> str:
    found = {(row["batch"], row["arm"]): row["us"] for row in rows}
    lines = [
        (batch, found[batch, "triton"], found[batch, "naive"])
        for batch in dict.fromkeys(batch for batch, _ in found)
    ]
    return _table(("batch", "one launch, Triton", "torch"), lines)


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


def _together(rows: list[dict[str, Any]], of: str) -> str:
    found = {(row["dim"], row["vectors"], row["arm"]): row["us"] for row in rows}
    lines = []
    for dim in sorted({dim for dim, _, arm in found if arm.startswith(of)}):
        sizes = sorted({n for d, n, arm in found if d == dim and arm.startswith(of)})
        cells = []
        for vectors in sizes:
            ours, torch = (found[dim, vectors, f"{of}-{name}"] for name in ("triton", "naive"))
            cells += [f"{1e-3 * ours:.2f}", f"{torch / ours:.1f}×"]
        lines.append((dim, *cells))
    return _table(("d", "page, ms", "faster", "prompt, ms", "faster"), lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ("---",) * len(head), *(tuple(map(_cell, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
