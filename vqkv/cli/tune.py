"""`vqkv tune`: find a scheme for a model and a budget of bits."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from vqkv.cli.choice import (
    CalibrateOnOption,
    CalibrationTokensOption,
    ContextOption,
    DeviceOption,
    DType,
    DTypeOption,
    Model,
    ScoredTokensOption,
    SeedOption,
    SkipOption,
    open_model,
)
from vqkv.cli.output import JsonFlag, fail, print_json, print_table
from vqkv.cli.progress import progress_bars
from vqkv.errors import SchemeError


class FamilyName(StrEnum):
    """What kind of scheme to look for."""

    recommended = "recommended"
    fast = "fast"


class Objective(StrEnum):
    """What to choose by."""

    kl = "kl"
    ratio = "ratio"


def tune(
    model: Model,
    bits: Annotated[float, typer.Option(min=0.1, max=8, help="Bits per value to stay within.")],
    text: Annotated[
        list[Path],
        typer.Option(help="Text to choose by, that no calibration saw; repeat for several."),
    ],
    out: Annotated[Path, typer.Option(help="Scheme file to write.")],
    family: Annotated[
        FamilyName,
        typer.Option(help="`recommended` for fidelity at any cost of decoding; `fast` for speed."),
    ] = FamilyName.recommended,
    objective: Annotated[
        Objective, typer.Option(help="KL to the exact model, or perplexity ratio.")
    ] = Objective.kl,
    calibrate_on: CalibrateOnOption = None,
    calibration_tokens: CalibrationTokensOption = 32768,
    tokens: ScoredTokensOption = 8192,
    skip: SkipOption = 0,
    context: ContextOption = 2048,
    seed: SeedOption = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    dtype: DTypeOption = DType.auto,
    device: DeviceOption = "cpu",
    json: JsonFlag = False,
) -> None:
    """Spend bits where a model needs them. Goes on where it was interrupted.

    Prints every scheme that it tried, and writes the best within the budget as a scheme file.
    Exit code 3: the canary of some scheme failed, and nothing is written.
    """
    from vqkv.calibration import check_context, read_text
    from vqkv.evaluation.compare import Settings
    from vqkv.folders import write_whole
    from vqkv.models import load_config
    from vqkv.provenance import provenance
    from vqkv.texts import CALIBRATION_MIX, bundled_text
    from vqkv.tuning import TEMPLATES, best, scheme_file
    from vqkv.tuning import tune as run

    if out.is_dir() or (out.exists() and not force):
        raise SchemeError(f"{out} exists already: choose another file, or give --force to a file")
    for path in text:
        read_text(path)
    check_context(load_config(model), context)
    network, tokenizer = open_model(model, dtype, device)
    settings = Settings(
        calibration_texts=tuple(calibrate_on or map(bundled_text, CALIBRATION_MIX)),
        calibration_tokens=calibration_tokens,
        tokens=tokens,
        skip=skip,
        context=context,
        passages=0,
        seed=seed,
    )
    with progress_bars() as report:
        tried = list(
            run(network, tokenizer, text, bits, settings, family.value, objective.value, report)
        )
    blind = [candidate.scheme.name for candidate in tried if candidate.blind]
    if blind:
        fail(f"the canary failed for {', '.join(blind)}", code=3)
    chosen = best(tried, bits, objective.value)
    names = " and ".join(path.name for path in text)
    remarks = [
        f"Found by `vqkv tune` for {model} within {bits:g} bits per value: KL {chosen.kl:.4f}, "
        f"perplexity",
        f"ratio {chosen.ratio:.4f} on {tokens:,} tokens of {names}.",
        *chosen.notes,
    ]
    write_whole(out, scheme_file(chosen.scheme, TEMPLATES[family.value].preset, remarks))
    if json:
        print_json(
            {
                "model": model,
                "provenance": provenance(),
                "out": str(out),
                "chosen": chosen.scheme.name,
                "frontier": [candidate.to_dict() for candidate in tried],
            }
        )
        return
    for note in chosen.notes:
        typer.echo(note, err=True)
    print_table(
        ("scheme", "bits", "KL", "ratio", "KL expected", ""),
        [_cells(candidate, candidate is chosen) for candidate in tried],
        title=f"{model}, before use, on {names}",
        piped_heads=True,
    )


def _cells(candidate: Any, chosen: bool) -> tuple[str, ...]:
    return (
        candidate.scheme.name,
        f"{candidate.bits:.4g}",
        f"{candidate.kl:.4f}",
        f"{candidate.ratio:.4f}",
        f"{candidate.expected:.4f}",
        "chosen" if chosen else "",
    )
