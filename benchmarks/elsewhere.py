r"""Fitted schemes where calibration did not look: in longer windows, and on source code.

    python benchmarks/elsewhere.py contexts ARTEFACT ...
    python benchmarks/elsewhere.py code ARTEFACT ...
    python benchmarks/elsewhere.py contexts ARTEFACT --tokens 65536 --texts persuasion \
        --out benchmarks/results/contexts-long.json

The demo model, before use, with the artefacts' own sinks. `contexts` scores the same tokens of the
two evaluation texts, from token 4,096 on, in windows of 2,048 and of 8,192; artefacts were
calibrated in windows of 2,048. `code` scores modules of the standard library in windows of
2,048. Interrupted, the same command goes on where it was; rows of other schemes stay, each with
its commit. Exact logits take 200 kB a token in a temporary folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vqkv import KVCompressor, load_model
from vqkv.calibration import read_text
from vqkv.calibration.windows import Text
from vqkv.evaluation import evaluate
from vqkv.evaluation.exact import ExactLogits
from vqkv.provenance import commit, write
from vqkv.texts import EVALUATION_TEXTS, bundled_text

CONTEXT, LONG_CONTEXT, SKIP = 2048, 8192, 4096
#: Characters of source code that are enough for any number of tokens that one waits for.
CHARACTERS = 1 << 20


def source_code() -> Text:
    """Public top-level modules of the standard library, one after the other by name."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    parts: list[str] = []
    for path in sorted(folder.glob("[a-z]*.py")):
        if sum(map(len, parts)) < CHARACTERS:
            parts.append(path.read_text(encoding="utf-8"))
    content = "\n".join(parts)
    digest = hashlib.sha256(content.encode()).hexdigest()
    return Text(f"standard library of Python {platform.python_version()}", content, digest)


def conditions(what: str, texts: Sequence[str]) -> Iterator[tuple[Text, int]]:
    """Texts, and tokens of a window."""
    if what == "code":
        yield source_code(), CONTEXT
        return
    for context in (CONTEXT, LONG_CONTEXT):
        for name in texts:
            yield read_text(bundled_text(name)), context


def place(row: dict[str, Any]) -> tuple[Any, ...]:
    """What no two rows share: a scheme's newer artefact takes an older one's place."""
    return tuple(row[name] for name in ("scheme", "text", "context"))


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    """Print the rows."""
    table = Table("scheme", "bits", "text", "context", "KL", "ratio", "top-1")
    for row in rows:
        shown = (f"{row['kl']:.4f}", f"{row['ratio']:.4f}", f"{row['top1_agreement']:.3f}")
        named = (row["scheme"], f"{row['bits_per_value']:.4g}", row["text"], str(row["context"]))
        table.add_row(*named, *shown)
    console.print(table)


def main() -> None:
    """Score, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["contexts", "code"])
    parser.add_argument("artefacts", type=Path, nargs="+", help="what `vqkv calibrate` wrote")
    parser.add_argument("--tokens", type=int, default=16384, help="to score, per text")
    parser.add_argument(
        "--texts",
        nargs="+",
        choices=EVALUATION_TEXTS,
        default=EVALUATION_TEXTS,
        help="for contexts",
    )
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/WHAT.json")
    arguments = parser.parse_args()
    if arguments.what == "code" and arguments.texts != EVALUATION_TEXTS:
        parser.error("--texts are for contexts: code is scored on the standard library")
    out = arguments.out or Path(f"benchmarks/results/{arguments.what}.json")

    model, tokenizer = load_model("demo")
    settings = {"tokens": arguments.tokens, "skip": 0 if arguments.what == "code" else SKIP}
    rows: list[dict[str, Any]] = []
    if out.exists():
        found = json.loads(out.read_text(encoding="utf-8"))
        if found["settings"] != settings:
            raise SystemExit(f"{out} holds figures of {found['settings']}, not of {settings}")
        rows = found["rows"]
    with tempfile.TemporaryDirectory() as scratch:
        exact = ExactLogits(model, Path(scratch))
        for folder in arguments.artefacts:
            compressor = KVCompressor.from_pretrained(folder, model.config)
            for text, context in conditions(arguments.what, arguments.texts):
                case = {"artefact": compressor.identity(), "text": text.name, "context": context}
                if any(case.items() <= row.items() for row in rows):
                    continue
                evaluation = evaluate(
                    model,
                    tokenizer,
                    compressor,
                    text,
                    tokens=arguments.tokens,
                    context=context,
                    skip=settings["skip"],
                    canary=False,
                    passages=0,
                    exact=exact,
                )
                row = {**evaluation.to_dict(), **case, "commit": commit()}
                rows = [each for each in rows if place(each) != place(row)] + [row]
                write(out, {"settings": settings, "rows": rows})
    show(Console(), rows)


if __name__ == "__main__":
    main()
