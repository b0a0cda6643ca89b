"""Quality, memory and calibration of one preset on the demo model.

    python benchmarks/demo_model.py --scheme cq-4c8b --out benchmarks/results/cq-4c8b.json

Calibrates on the calibration mix (half *Emma*, half the Python tutorial), each time in a process
of its own, whose peak of resident memory should not depend on the number of tokens. Evaluates on
the two other texts, in both modes, and fills a 16-bit cache with 4,096 tokens, whose bytes are
held against the growth of all live tensor storage of the process.

Figures to hold for cq-4c8b: perplexity ratios before use of at most 1.22 (persuasion) and 1.40
(python-library); peak memory at 65,536 tokens within 10 % of that at 16,384; at most 0.16 of the
16-bit cache at 4,096 tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vqkv import KVCompressor, VQCache, attach, load_model
from vqkv.calibration import read_text, text_windows
from vqkv.evaluation.memory import live_storage_bytes
from vqkv.provenance import write
from vqkv.texts import CALIBRATION_MIX, EVALUATION_TEXTS, bundled_text

MEMORY_TOKENS = 4096


def command(*arguments: Any) -> dict[str, Any]:
    """What `vqkv ... --json` printed."""
    run = subprocess.run(
        [sys.executable, "-m", "vqkv", *map(str, arguments), "--json"],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    result: dict[str, Any] = json.loads(run.stdout)
    return result


def calibrated(scheme: str, tokens: int, out: Path) -> dict[str, Any]:
    """Calibrate to `out`, in a process of its own."""
    texts = [part for name in CALIBRATION_MIX for part in ("--text", bundled_text(name))]
    return command(
        "calibrate", "demo", "--scheme", scheme, *texts, "--tokens", tokens, "--out", out
    )


def evaluated(artefact: Path, text: str, tokens: int, *options: Any) -> dict[str, Any]:
    """Evaluate on a bundled text, from token 4,096 on."""
    return command(
        *("evaluate", "demo", "--compressor", artefact, "--text", bundled_text(text)),
        *("--tokens", tokens, "--skip", 4096, *options),
    )


@torch.no_grad()
def memory(artefact: Path) -> dict[str, Any]:
    """Bytes of a bfloat16 cache that was filled a few tokens at a time."""
    model, tokenizer = load_model("demo", dtype=torch.bfloat16)
    compressor = KVCompressor.from_pretrained(artefact, model.config)
    text = read_text(bundled_text(EVALUATION_TEXTS[0]))
    (window,) = text_windows(tokenizer, text, MEMORY_TOKENS, MEMORY_TOKENS, 4096)
    with attach(model, compressor):
        cache = VQCache(compressor, model.config)
        model(window[None, :8], past_key_values=cache)
        before, counted = live_storage_bytes(), cache.nbytes()["total"]
        for part in window[None, 8:].split(128, 1):
            model(part, past_key_values=cache, logits_to_keep=1)
        del part
        grown = live_storage_bytes() - before
    sizes = cache.nbytes()
    return {
        "tokens": cache.get_seq_length(),
        "dtype": "bfloat16",
        "cache_bytes": sizes,
        "cache_bytes_exact": cache.nbytes_exact(),
        "of_16_bit_cache": sizes["total"] / cache.nbytes_exact(),
        "live_storage_growth": grown,
        "growth_over_count": grown / (sizes["total"] - counted),
    }


def show(console: Console, result: dict[str, Any]) -> None:
    """Print the figures as tables."""
    table = Table("mode", "text", "tokens", "KL", "ratio", "top-1", "of 16-bit cache")
    for e in result["evaluations"]:
        shown = (f"{e['kl']:.4f}", f"{e['ratio']:.4f}", f"{e['top1_agreement']:.3f}")
        share = e["cache_bytes"] / e["cache_bytes_exact"]
        table.add_row(e["mode"], e["text"], str(e["tokens"]), *shown, f"{share:.3f}")
    console.print(table)
    table = Table("calibration tokens", "capture s", "learn s", "peak RSS MB")
    for c in result["calibrations"]:
        seconds = (f"{c['seconds_capture']:.0f}", f"{c['seconds_learn']:.0f}")
        table.add_row(str(c["tokens"]), *seconds, f"{c['peak_rss_bytes'] / 1e6:.0f}")
    console.print(table)
    found = result["memory"]
    console.print(
        f"{found['tokens']} tokens in bfloat16: {found['of_16_bit_cache']:.4f} of the 16-bit "
        f"cache; live storage grew by {found['growth_over_count']:.3f} times what nbytes says"
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--scheme", default="cq-4c8b", help="a preset, or a scheme file")
    parser.add_argument("--calibrate", type=int, nargs="+", default=[16384, 65536, 32768])
    parser.add_argument("--tokens", type=int, default=8192, help="to evaluate on, per text")
    parser.add_argument("--passages", type=int, default=8, help="repeated passages per length")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/demo-model.json"))
    arguments = parser.parse_args()

    result: dict[str, Any] = {"calibrations": [], "evaluations": []}
    with tempfile.TemporaryDirectory() as scratch:
        for tokens in arguments.calibrate:  # the last one is evaluated
            artefact = Path(scratch, str(tokens))
            made = calibrated(arguments.scheme, tokens, artefact)
            result["calibrations"].append({"tokens": tokens, **made})
            write(arguments.out, result)
        result["memory"] = memory(artefact)
        write(arguments.out, result)
        for text in EVALUATION_TEXTS:
            before = ("--passages", arguments.passages)
            chunked = ("--mode", "chunked", "--window", 128, "--passages", 0)
            for options in (before, chunked):
                result["evaluations"].append(evaluated(artefact, text, arguments.tokens, *options))
                write(arguments.out, result)
    show(Console(), result)


if __name__ == "__main__":
    main()
