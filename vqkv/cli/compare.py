"""`vqkv compare`: many schemes on the same tokens of the same texts."""

from __future__ import annotations

import math
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
from vqkv.cli.output import JsonFlag, bytes_for_people, fail, print_json, print_table
from vqkv.cli.progress import progress_bars

COLUMNS = (
    *("scheme", "text", "bits", "KL", "ratio", "95 %", "top-1", "repeated", "side"),
    *("learn s", "encode µs", "decode µs"),
)


def compare(
    model: Model,
    scheme: Annotated[list[str], typer.Option(help="Preset or YAML file; repeat for several.")],
    text: Annotated[list[Path], typer.Option(help="Text to score on; repeat for several.")],
    calibrate_on: CalibrateOnOption = None,
    calibration_tokens: CalibrationTokensOption = 32768,
    tokens: ScoredTokensOption = 16384,
    skip: SkipOption = 4096,
    context: ContextOption = 2048,
    seed: SeedOption = 0,
    passages: Annotated[
        int, typer.Option(min=0, help="Repeated passages per length; 0 for none.")
    ] = 8,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results: JSON, a table, a plot.")
    ] = None,
    dtype: DTypeOption = DType.auto,
    device: DeviceOption = "cpu",
    json: JsonFlag = False,
) -> None:
    """Calibrate and score schemes side by side. Goes on where it was interrupted.

    Exit code 3: the canary of some row failed.
    """
    from vqkv.evaluation.compare import Settings
    from vqkv.evaluation.compare import compare as run
    from vqkv.evaluation.comparison import check_out, write_comparison
    from vqkv.provenance import provenance
    from vqkv.scheme_files import load_scheme
    from vqkv.texts import CALIBRATION_MIX, bundled_text

    schemes = [load_scheme(name) for name in scheme]
    if out is not None:
        check_out(out)
    network, tokenizer = open_model(model, dtype, device)
    settings = Settings(
        calibration_texts=tuple(calibrate_on or map(bundled_text, CALIBRATION_MIX)),
        calibration_tokens=calibration_tokens,
        tokens=tokens,
        skip=skip,
        context=context,
        passages=passages,
        seed=seed,
    )
    with progress_bars() as report:
        rows = list(run(network, tokenizer, schemes, text, settings, report))
    data: dict[str, Any] = {
        "model": model,
        "provenance": provenance(),
        "settings": {
            **vars(settings),
            "calibration_texts": [path.name for path in settings.calibration_texts],
        },
        "rows": [vars(row) for row in rows],
    }
    if out is not None:
        write_comparison(out, data)
    if json:
        print_json(data)
    else:
        print_table(
            COLUMNS,
            [cells(row) for row in data["rows"]],
            title=f"{model}, before use",
            piped_heads=True,
        )
    evaluations = [row["evaluation"] for row in data["rows"]]
    blind = sorted({e["scheme"] for e in evaluations if not e["canary_ok"]})
    if blind:
        fail(f"the canary failed for {', '.join(blind)}", code=3)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    e = row["evaluation"]
    low, high = map(math.exp, e["interval"])
    repeated = ", ".join(f"{n}: {loss:.2f}" for n, loss in e["repeated_passage"].items())
    seconds = row["seconds_learn"]
    return (
        e["scheme"],
        e["text"],
        f"{e['bits_per_value']:.4g}",
        f"{e['kl']:.4f}",
        f"{e['ratio']:.4f}",
        f"{low:.4f} to {high:.4f}",
        f"{e['top1_agreement']:.3f}",
        repeated,
        bytes_for_people(e["side_bytes"]["total"]),
        "" if seconds is None else f"{seconds:.0f}",
        f"{row['encode_us']:.0f}",
        f"{row['decode_us']:.0f}",
    )
