"""Which axes suit transformers' backends best, on text that no table is of.

    python -m benchmarks.peers.axes --out benchmarks/results/peers-axes.json

KL of every pair of axes at 2 bits and groups of 64, over one window of each calibration text.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.peers.cache import opener
from benchmarks.peers.quantized_cache import OTHER_AXIS, Grouping, QuantizedCachePeer
from vqkv import load_model
from vqkv.calibration import calibration_windows, read_text
from vqkv.evaluation.arms import Arms
from vqkv.evaluation.exact import ExactLogits
from vqkv.evaluation.scoring import Scores
from vqkv.provenance import write
from vqkv.texts import CALIBRATION_MIX, bundled_text

CONTEXT, SINKS, BITS = 512, 4, 2


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/peers-axes.json"))
    arguments = parser.parse_args()
    model, tokenizer = load_model("demo")
    texts = [read_text(bundled_text(name)) for name in CALIBRATION_MIX]
    windows = calibration_windows(tokenizer, texts, CONTEXT * len(texts), CONTEXT)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        exact = ExactLogits(model, Path(scratch))
        for backend, other in OTHER_AXIS.items():
            for axes in itertools.product((0, other), repeat=2):
                peer = QuantizedCachePeer("", backend, BITS, model.config, Grouping(*axes))
                arms = Arms(model, opener(model, peer, SINKS), exact=exact)
                kl = Scores.joined([arms.scores(window) for window in windows]).kl.mean()
                found.append({"backend": backend, "axes": axes, "kl": float(kl)})
    table = Table("backend", "axis of keys", "axis of values", "KL")
    for row in found:
        shown = (str(axis) for axis in row["axes"])
        table.add_row(row["backend"], *shown, f"{row['kl']:.4f}")
    Console().print(table)
    write(
        arguments.out, {"context": CONTEXT, "bits": BITS, "group": Grouping().size, "rows": found}
    )


if __name__ == "__main__":
    main()
