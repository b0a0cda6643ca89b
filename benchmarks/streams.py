"""Where a scheme loses: keys alone, values alone, and the squared error of each.

    python benchmarks/streams.py kivi-2 turboquant-2.5 ARTEFACT...

Presets and scheme files that learn nothing are taken as they are, others as the folder that
`vqkv calibrate` wrote. The demo model, before use, 4 sinks. Schemes that were measured before and
are not named keep their rows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from vqkv import Geometry, KVCompressor, attach, load_model, load_scheme
from vqkv.cache.before_use import BeforeUseCache, BeforeUseLayer
from vqkv.calibration import read_text, text_windows
from vqkv.evaluation.arms import Arms
from vqkv.evaluation.exact import ExactLogits
from vqkv.evaluation.scoring import Scores
from vqkv.folders import write_whole
from vqkv.layouts import Stream
from vqkv.provenance import provenance
from vqkv.scheme import STREAMS
from vqkv.texts import EVALUATION_TEXTS, bundled_text

OUT = Path(__file__).parent / "results" / "streams.json"
TOKENS, CONTEXT, SKIP, SINKS = 4096, 2048, 4096, 4


@dataclass
class Tally:
    """Sums over a stream's states, as it codes them, without the sinks.

    Attributes:
        error: squared, of reconstructions.
        energy: of the states, squared.
        spread: squared distance from each channel's mean over a window.
    """

    error: float = 0.0
    energy: float = 0.0
    spread: float = 0.0

    def add(self, states: torch.Tensor, decoded: torch.Tensor) -> None:
        """States `[B, H, T, D]` of a window and their reconstructions."""
        x = states.double()
        self.error += float((x - decoded).square().sum())
        self.energy += float(x.square().sum())
        self.spread += float((x - x.mean(2, keepdim=True)).square().sum())


class OneStreamLayer(BeforeUseLayer):
    """Codes one stream of a layer and reads the other exactly.

    Predictors still see reconstructions of both, as they do in use.
    """

    coding: Stream
    tally: Tally

    def coded(self, stream: Stream, states: torch.Tensor) -> torch.Tensor:
        """There and back, or as it was."""
        decoded = super().coded(stream, states)
        if stream != self.coding:
            return states.clone()
        self.tally.add(states[:, :, self.sinks :], decoded[:, :, self.sinks :])
        return decoded


def one_stream_arms(
    model: PreTrainedModel, compressor: KVCompressor, stream: Stream, exact: ExactLogits
) -> tuple[Arms, Tally]:
    """Arms in which only `stream` is coded, and what is counted meanwhile."""
    tally = Tally()

    @contextmanager
    def open_cache() -> Iterator[Cache]:
        with attach(model, compressor):
            cache = BeforeUseCache(compressor, model.config)
            for index in compressor.geometry.compressed:
                layer = OneStreamLayer(index, compressor, cache.rows)
                layer.coding, layer.tally = stream, tally
                cache.layers[index] = layer
            yield cache

    return Arms(model, open_cache, exact=exact), tally


def figures(
    model: PreTrainedModel,
    compressor: KVCompressor,
    windows: list[torch.Tensor],
    exact: ExactLogits,
) -> dict[str, Any]:
    """Of each stream: the perplexity ratio and KL with it alone coded, and relative errors."""
    found: dict[str, Any] = {"scheme": compressor.scheme.name}
    for stream in STREAMS:
        arms, tally = one_stream_arms(model, compressor, stream, exact)
        scores = Scores.joined(arms.scores(window) for window in windows)
        layout = compressor.codec(compressor.geometry.compressed[-1], stream).layout
        found[stream] = {
            "bits_per_value": layout.bits_per_value,
            "ratio": scores.perplexity / scores.perplexity_exact,
            "kl": float(scores.kl.mean()),
            "error_of_energy": tally.error / tally.energy,
            "error_of_variance": tally.error / tally.spread,
            "energy_in_means": 1 - tally.spread / tally.energy,
        }
    return found


def compressor_of(given: str, model: PreTrainedModel) -> KVCompressor:
    """An artefact, or a scheme that learns nothing."""
    if Path(given).is_dir():
        compressor = KVCompressor.from_pretrained(given, model.config)
    else:
        compressor = KVCompressor(load_scheme(given), Geometry.from_model(model))
    return compressor.with_residency(sinks=SINKS)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("given", nargs="+", help="presets, scheme files, artefacts")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    model, tokenizer = load_model("demo")
    text = read_text(bundled_text(EVALUATION_TEXTS[0]))
    windows = text_windows(tokenizer, text, TOKENS, CONTEXT, SKIP)
    settings = {
        **{"text": text.name, "sha256": text.sha256, "skip": SKIP, "tokens": TOKENS},
        **{"context": CONTEXT, "sinks": SINKS},
    }
    rows = {}
    if arguments.out.exists():
        earlier = json.loads(arguments.out.read_text(encoding="utf-8"))
        rows = {row["scheme"]: row for row in earlier["rows"] if earlier["settings"] == settings}
    with tempfile.TemporaryDirectory() as scratch:
        exact = ExactLogits(model, Path(scratch))
        for given in arguments.given:
            row = figures(model, compressor_of(given, model), windows, exact)
            rows[row["scheme"]] = {**row, "provenance": provenance()}
            write_whole(
                arguments.out,
                json.dumps({"settings": settings, "rows": list(rows.values())}, indent=2) + "\n",
            )
    table = Table("scheme", "stream", *next(iter(rows.values()))["keys"])
    for row in rows.values():
        for stream in STREAMS:
            table.add_row(row["scheme"], stream, *(f"{x:.4g}" for x in row[stream].values()))
    Console().print(table)


if __name__ == "__main__":
    main()
