"""A comparison as a folder: JSON, a table to read, a plot of quality against bits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from vqkv.evaluation.report import plot
from vqkv.folders import check_free, replacing

#: All that is in the folder.
FILES = frozenset({"comparison.json", "comparison.md", "plot.png"})

HEAD = (
    *("scheme", "bits", "KL", "perplexity ratio", "95 %", "top-1", "repeated passage", "side MB"),
    *("learn s", "encode µs", "decode µs"),
)


def check_out(folder: Path) -> None:
    """Raises ArtefactError where the folder holds anything else than an older comparison."""
    check_free(folder, FILES, overwrite=True)


def write_comparison(folder: Path, data: dict[str, Any]) -> None:
    """Write the folder, all or nothing; an older comparison gives way.

    Raises:
        ArtefactError: the folder holds anything else.
    """
    check_out(folder)
    with replacing(folder) as work:
        text = json.dumps(data, indent=2, allow_nan=False)
        (work / "comparison.json").write_text(text + "\n", encoding="utf-8")
        (work / "comparison.md").write_text(markdown(data), encoding="utf-8")
        rows = [row["evaluation"] for row in data["rows"]]
        plot(
            [(e["text"], e["scheme"], e["bits_per_value"], e["kl"]) for e in rows],
            work / "plot.png",
        )


def markdown(data: dict[str, Any]) -> str:
    """A table per text, best KL first among schemes of the same bits."""
    parts = []
    for text in dict.fromkeys(row["evaluation"]["text"] for row in data["rows"]):
        mine = [row for row in data["rows"] if row["evaluation"]["text"] == text]
        mine.sort(key=lambda row: (-row["evaluation"]["bits_per_value"], row["evaluation"]["kl"]))
        first = mine[0]["evaluation"]
        losses = ", ".join(f"{x:.2f} at {n}" for n, x in first["repeated_passage_exact"].items())
        parts.append(f"## {text}, {first['tokens']:,} tokens\n")
        if losses:
            parts.append(f"Exact loss on repeated passages: {losses}.\n")
        parts.append("| " + " | ".join(HEAD) + " |\n|" + " --- |" * len(HEAD))
        parts.extend("| " + " | ".join(_cells(row)) + " |" for row in mine)
        parts.append("")
    return "\n".join(parts)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    e, seconds = row["evaluation"], row["seconds_learn"]
    low, high = map(math.exp, e["interval"])
    return (
        f"`{e['scheme']}`",
        f"{e['bits_per_value']:.4g}",
        f"{e['kl']:.4f}",
        f"{e['ratio']:.4f}",
        f"{low:.4f} … {high:.4f}",
        f"{100 * e['top1_agreement']:.1f} %",
        ", ".join(f"{loss:.2f}" for loss in e["repeated_passage"].values()),
        f"{e['side_bytes']['total'] / 1e6:.1f}",
        "" if seconds is None else f"{seconds:.0f}",
        f"{row['encode_us']:.0f}",
        f"{row['decode_us']:.0f}",
    )
