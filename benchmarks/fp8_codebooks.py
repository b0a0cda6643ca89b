"""What codebooks in fp8 cost, which `attend_codes.cuda` reads: a scheme as it is, and rounded.

    python benchmarks/fp8_codebooks.py ARTEFACT

The demo model, before use, 4 sinks, on text that nothing was learned from.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vqkv import KVCompressor, load_model
from vqkv.calibration import read_text, text_windows
from vqkv.codec import Codec
from vqkv.evaluation.arms import compressor_arms
from vqkv.evaluation.exact import ExactLogits
from vqkv.evaluation.scoring import Scores
from vqkv.kernels.cuda.tables import as_read
from vqkv.provenance import write
from vqkv.quantizers.codebook import CodebookQuantizer
from vqkv.texts import EVALUATION_TEXTS, bundled_text

OUT = Path(__file__).parent / "results" / "fp8-codebooks.json"
TOKENS, CONTEXT, SKIP, SINKS = 8192, 2048, 4096, 4


class RoundedCodec(Codec):
    """A fitted codec whose codewords are rounded as the kernel rounds them, head by head."""

    def __init__(self, codec: Codec) -> None:
        self.__dict__.update(codec.__dict__)
        self.quantizers = [copy.copy(quantizer) for quantizer in codec.quantizers]
        for quantizer in self.quantizers:
            assert isinstance(quantizer, CodebookQuantizer)
            by_head = quantizer.codewords_.unflatten(0, (codec.heads, -1))
            rounded = as_read(by_head).flatten(0, 1)
            quantizer.codewords_ = rounded.to(quantizer.codewords_.dtype)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artefact", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    model, tokenizer = load_model("demo")
    learned = KVCompressor.from_pretrained(arguments.artefact, model.config)
    learned = learned.with_residency(sinks=SINKS)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        exact = ExactLogits(model, Path(scratch))
        for name in EVALUATION_TEXTS:
            text = read_text(bundled_text(name))
            windows = text_windows(tokenizer, text, TOKENS, CONTEXT, SKIP)
            for codebooks in ("fp16", "fp8"):
                coded = learned if codebooks == "fp16" else learned.with_codecs(RoundedCodec)
                arms = compressor_arms(model, coded, "before-use", CONTEXT, exact)
                scores = Scores.joined(arms.scores(window) for window in windows)
                rows.append(
                    {
                        "text": text.name,
                        "codebooks": codebooks,
                        "ratio": scores.perplexity / scores.perplexity_exact,
                        "kl": float(scores.kl.mean()),
                    }
                )
    settings = {"tokens": TOKENS, "context": CONTEXT, "skip": SKIP, "sinks": SINKS}
    write(arguments.out, {"scheme": learned.scheme.name, "settings": settings, "rows": rows})
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
