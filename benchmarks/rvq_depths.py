"""RVQ by depth: 2 to 8 residual stages, keys strided or contiguous, k-means or EMA.

    python benchmarks/rvq_depths.py --work rvq-depths

The demo model under rvq-2.875, before use, 4 sinks. One fit of 8 stages for each grouping of keys
and learner; depth R is its first R stages. Calibrated on the calibration mix, evaluated on the two
other texts from token 4,096 on. Interrupted, the same command goes on where it was.

So that the sweep ends within the hour on one core, learners see far fewer tokens than the paper's
10M and the preset's 32,768, in 10 rounds of k-means or the start and 50 steps of EMA: read rows
against each other, not as RVQ's best.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from vqkv import Geometry, KVCompressor, load_model, load_scheme
from vqkv.calibration import Spool, calibration_windows, read_text, text_windows
from vqkv.calibration.partial import StreamFiles
from vqkv.calibration.source import CapturedStates
from vqkv.calibration.spooling import capture, wanted_kinds
from vqkv.compressor import FittedStream
from vqkv.evaluation.arms import compressor_arms
from vqkv.evaluation.exact import ExactLogits
from vqkv.evaluation.scoring import Scores
from vqkv.provenance import write
from vqkv.scheme import Scheme, merge
from vqkv.scheme_files import scheme_from_dict
from vqkv.texts import CALIBRATION_MIX, EVALUATION_TEXTS, bundled_text
from vqkv.truncation import first_stages

PRESET = "rvq-2.875"
DEPTHS = (2, 4, 6, 8)
CONTEXT, SKIP = 2048, 4096
GROUPINGS = ("strided", "contiguous")
#: As in the paper, EMA starts from k-means on some vectors and then follows batches of all.
LEARNERS: dict[str, dict[str, Any]] = {
    "ema": {"type": "ema", "init_samples": 16384, "init_iterations": 10, "batch": 4096},
    "kmeans": {"type": "kmeans", "iterations": 10},
}


def scheme_of(grouping: str, learner: str, tokens: int) -> Scheme:
    """The preset with another grouping of keys, and another learner."""
    learned = {"quantizer": {"learner": LEARNERS[learner]}}
    changes = {
        "name": f"rvq-{grouping}-{learner}",
        "keys": {"grouping": {"type": grouping, "dim": 32}, **learned},
        "values": learned,
        "calibration": {"samples": tokens},
    }
    return scheme_from_dict(merge(load_scheme(PRESET).to_dict(), changes))


def captured(model: PreTrainedModel, windows: list[torch.Tensor], work: Path) -> CapturedStates:
    """What all fits learn from; `work` keeps it."""
    tokens = sum(map(len, windows))
    compressor = KVCompressor(load_scheme(PRESET), Geometry.from_model(model))
    spool = Spool(work / f"states-{tokens}", compressor.scheme.residency.sinks)
    capture(model, wanted_kinds(compressor), windows, spool)
    return CapturedStates(spool, model, compressor, CONTEXT)


def fits(
    model: PreTrainedModel, source: CapturedStates, tokens: int, work: Path
) -> Iterator[tuple[str, str, KVCompressor]]:
    """Each grouping and learner with its compressor; groupings of keys share the values' fit."""
    for learner in LEARNERS:
        values: dict[str, FittedStream] = {}
        for grouping in GROUPINGS:
            scheme = scheme_of(grouping, learner, tokens)
            folder = work / scheme.fingerprint()[:16]
            folder.mkdir(parents=True, exist_ok=True)
            fitted = StreamFiles(folder)
            for name, stream in values.items():
                fitted.setdefault(name, stream)
            compressor = KVCompressor(scheme, Geometry.from_model(model))
            compressor.fit(source, checkpoint=fitted)
            values = {name: fitted[name] for name in fitted if name.endswith(".values")}
            yield grouping, learner, compressor


def figures(
    model: PreTrainedModel,
    compressor: KVCompressor,
    windows: list[torch.Tensor],
    exact: ExactLogits,
) -> dict[str, Any]:
    """One compressor on one text."""
    arms = compressor_arms(model, compressor, "before-use", CONTEXT, exact)
    scores = Scores.joined(arms.scores(window) for window in windows)
    return {
        "bits_per_value": compressor.bits_per_value,
        "side_bytes": compressor.nbytes(),
        "tokens": len(scores.exact),
        "kl": float(scores.kl.mean()),
        "ratio": scores.perplexity / scores.perplexity_exact,
        "interval": scores.interval(),
        "top1_agreement": float(scores.agree.mean()),
    }


def earlier_rows(out: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """What an interrupted run with the same settings has measured."""
    if not out.exists():
        return []
    found = json.loads(out.read_text(encoding="utf-8"))
    return list(found["rows"]) if found["settings"] == settings else []


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    """Print the rows."""
    table = Table("keys", "learner", "stages", "bits", "text", "KL", "ratio", "top-1")
    for row in rows:
        named = (row[name] for name in ("keys", "learner", "depth", "bits_per_value", "text"))
        shown = (f"{row['kl']:.4f}", f"{row['ratio']:.4f}", f"{row['top1_agreement']:.3f}")
        table.add_row(*map(str, named), *shown)
    console.print(table)


def main() -> None:
    """Fit, truncate, score, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--calibrate", type=int, default=8192, help="tokens to calibrate on")
    parser.add_argument("--tokens", type=int, default=2048, help="to evaluate on, per text")
    parser.add_argument("--work", type=Path, required=True, help="folder for fits and logits")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rvq-depths.json"))
    arguments = parser.parse_args()

    model, tokenizer = load_model("demo")
    sinks = load_scheme(PRESET).residency.sinks
    texts = [read_text(bundled_text(name)) for name in CALIBRATION_MIX]
    windows = calibration_windows(tokenizer, texts, arguments.calibrate, CONTEXT)
    source = captured(model, windows, arguments.work)
    scored = {
        name: text_windows(
            tokenizer, read_text(bundled_text(name)), arguments.tokens, CONTEXT, SKIP
        )
        for name in EVALUATION_TEXTS
    }
    exact = ExactLogits(model, arguments.work / "exact")

    settings = {
        "preset": PRESET,
        "learners": LEARNERS,
        "calibration_tokens": arguments.calibrate,
        "tokens": arguments.tokens,
        "context": CONTEXT,
        "skip": SKIP,
        "sinks": sinks,
    }
    rows = earlier_rows(arguments.out, settings)
    done = {(row["keys"], row["learner"], row["depth"], row["text"]) for row in rows}
    for grouping, learner, compressor in fits(model, source, arguments.calibrate, arguments.work):
        for depth in DEPTHS:
            for text, parts in scored.items():
                row = {"keys": grouping, "learner": learner, "depth": depth, "text": text}
                if tuple(row.values()) not in done:
                    rows.append(
                        {**row, **figures(model, first_stages(compressor, depth), parts, exact)}
                    )
                    write(arguments.out, {"settings": settings, "rows": rows})
    show(Console(), rows)


if __name__ == "__main__":
    main()
