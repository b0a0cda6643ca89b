"""The demo: two presets on the demo model, from calibration to a report."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from vqkv.calibration import calibrate
from vqkv.compressor import KVCompressor
from vqkv.evaluation import Evaluation, evaluate
from vqkv.evaluation.report import FILES as REPORT_FILES
from vqkv.evaluation.report import write_report
from vqkv.folders import check_free
from vqkv.generation import Continuation, continue_prompt
from vqkv.models import DEMO, load_model
from vqkv.scheme_files import load_scheme
from vqkv.texts import CALIBRATION_MIX, EVALUATION_TEXTS, bundled_text

SCHEMES = ("spectral-2", "spectral-1")
CALIBRATION_TOKENS = 16384
EVALUATION_TOKENS = 4096
#: Where evaluation starts in its texts, past their front matter.
SKIP = 4096
PROMPT_CHARACTERS = 6000
NEW_TOKENS = 32

INTRODUCTION = (
    f"SmolLM2-135M, calibrated on {CALIBRATION_TOKENS:,} tokens, evaluated on "
    f"{EVALUATION_TOKENS:,} tokens of each other text: every key and value but 4 sinks is replaced "
    "by its reconstruction before attention. Cache bytes are those of the continuation's cache, "
    "with its exact window, against 16 bits per value; the short prompt makes the window weigh. "
    "The exact cache holds 32 bits per value, as the model runs in 32 bits."
)


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured."""

    columns: ClassVar[tuple[str, ...]] = (
        *("scheme", "text", "bits/value", "KL", "perplexity ratio", "cache bytes"),
        *("16-bit cache", "tokens/s"),
    )

    evaluations: tuple[Evaluation, ...]
    continuations: dict[str, Continuation]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def table(self) -> list[tuple[str, ...]]:
        """A row for each scheme and text, and one for the exact cache."""
        exact = self.continuations["exact"]
        rows: list[tuple[str, ...]] = [("exact", "", "16", "0", "1", *_cache_cells(exact))]
        for e in self.evaluations:
            quality = (f"{e.bits_per_value:g}", f"{e.kl:.3f}", f"{e.ratio:.3f}")
            rows.append((e.scheme, e.text, *quality, *_cache_cells(self.continuations[e.scheme])))
        return rows


def run_demo(out: Path, progress: Callable[[str, int, int], None]) -> DemoResult:
    """Calibrate, evaluate, generate, and write the report to `out`.

    Raises:
        ArtefactError: `out` holds anything else than an older report.
    """
    check_free(out, REPORT_FILES, overwrite=True)
    progress("load the model", 0, 1)
    model, tokenizer = load_model(DEMO)
    progress("load the model", 1, 1)
    texts = [bundled_text(name) for name in CALIBRATION_MIX]
    prompt = bundled_text(EVALUATION_TEXTS[0]).read_text(encoding="utf-8")
    prompt = prompt[20_000 : 20_000 + PROMPT_CHARACTERS].rsplit(" ", 1)[0]
    evaluations: list[Evaluation] = []

    def continued(name: str, compressor: KVCompressor | None = None) -> Continuation:
        progress(f"{name}: generate", 0, 1)
        made = continue_prompt(model, tokenizer, prompt, NEW_TOKENS, compressor=compressor)
        progress(f"{name}: generate", 1, 1)
        return made

    continuations = {"exact": continued("exact")}
    for name in SCHEMES:

        def tell(phase: str, done: int, total: int, name: str = name) -> None:
            progress(f"{name}: {phase}", done, total)

        with tempfile.TemporaryDirectory() as scratch:
            compressor: KVCompressor = calibrate(
                model,
                tokenizer,
                load_scheme(name),
                texts,
                tokens=CALIBRATION_TOKENS,
                out=Path(scratch) / name,
                progress=tell,
            ).compressor
        for text in EVALUATION_TEXTS:
            evaluations.append(
                evaluate(
                    model,
                    tokenizer,
                    compressor,
                    bundled_text(text),
                    tokens=EVALUATION_TOKENS,
                    skip=SKIP,
                    passages=0,
                    progress=lambda phase, done, total, text=text: tell(  # type: ignore[misc]
                        f"{phase} {text}", done, total
                    ),
                )
            )
        continuations[name] = continued(name, compressor)
    result = DemoResult(tuple(evaluations), continuations)
    write_report(
        out,
        title="vqkv demo",
        introduction=INTRODUCTION,
        columns=result.columns,
        rows=result.table(),
        evaluations=evaluations,
        continuations={"prompt": prompt, **{n: c.text for n, c in continuations.items()}},
        data=result.to_dict(),
    )
    return result


def _cache_cells(made: Continuation) -> tuple[str, str, str]:
    return (
        f"{made.cache_bytes:,}",
        f"{made.cache_bytes_exact:,}",
        f"{made.tokens_per_second:.3g}",
    )
