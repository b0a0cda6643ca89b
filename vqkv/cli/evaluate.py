"""`vqkv evaluate`: what a compressor costs in quality and saves in bytes."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vqkv.cli.choice import (
    CompressorOption,
    DeviceOption,
    DType,
    DTypeOption,
    Model,
    SchemeOption,
    choose_compressor,
    open_model,
)
from vqkv.cli.output import JsonFlag, bytes_for_people, fail, print_facts, print_json
from vqkv.cli.progress import progress_bars


class Mode(StrEnum):
    """How states reach attention."""

    before_use = "before-use"
    chunked = "chunked"


def evaluate(
    model: Model,
    text: Annotated[Path, typer.Option(help="Text file that no calibration saw.")],
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to evaluate on.")],
    compressor: CompressorOption = None,
    scheme: SchemeOption = None,
    mode: Annotated[Mode, typer.Option(help="How states reach attention.")] = Mode.before_use,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 2048,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens of a chunk, in chunked mode.")] = 256,
    skip: Annotated[int, typer.Option(min=0, help="Tokens to skip at the start.")] = 0,
    sinks: Annotated[int | None, typer.Option(min=0, help="In place of the scheme's.")] = None,
    window: Annotated[int | None, typer.Option(min=0, help="In place of the scheme's.")] = None,
    canary: Annotated[
        bool, typer.Option(help="Check that destroyed codes would have been noticed.")
    ] = True,
    passages: Annotated[
        int, typer.Option(min=0, help="Repeated passages per length; 0 for none.")
    ] = 8,
    dtype: DTypeOption = DType.auto,
    device: DeviceOption = "cpu",
    json: JsonFlag = False,
) -> None:
    """Compare a compressed cache with the exact one on a text. Exit code 3: the canary failed."""
    from vqkv.calibration import check_context, read_text
    from vqkv.evaluation import evaluate as run
    from vqkv.models import load_config

    # Whatever a look at the arguments can tell is told before the model is loaded.
    config = load_config(model)
    chosen = choose_compressor(compressor, scheme, config, sinks, window)
    check_context(config, context)
    content = read_text(text)
    network, tokenizer = open_model(model, dtype, device)
    with progress_bars() as report:
        result = run(
            network,
            tokenizer,
            chosen,
            content,
            tokens=tokens,
            mode=mode.value,
            context=context,
            chunk=chunk,
            skip=skip,
            canary=canary,
            passages=passages,
            progress=report,
        ).to_dict()
    for note in result["notes"]:
        sys.stderr.write(f"note: {note}\n")
    if json:
        print_json(result)
    else:
        sizes = {
            name: bytes_for_people(result[name]) for name in ("cache_bytes", "cache_bytes_exact")
        }
        print_facts({**result, **sizes}, title=f"{chosen.scheme.name} on {text.name}")
    if canary and not result["canary_ok"]:
        fail(
            "the canary failed: destroying every code hardly changed the score, so this "
            "evaluation does not read the codes",
            code=3,
        )
