"""`vqkv calibrate`: learn a scheme's codebooks on a model and some text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vqkv.cli.choice import (
    ContextOption,
    DeviceOption,
    DType,
    DTypeOption,
    Model,
    SeedOption,
    open_model,
)
from vqkv.cli.output import JsonFlag, bytes_for_people, print_facts, print_json
from vqkv.cli.progress import progress_bars


def calibrate(
    model: Model,
    scheme: Annotated[str, typer.Option(help="Preset or YAML file.")],
    text: Annotated[list[Path], typer.Option(help="Text file; repeat for several.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens in all, split over the texts.")],
    out: Annotated[Path, typer.Option(help="Folder for the artefact.")],
    seed: SeedOption = 0,
    context: ContextOption = 2048,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing artefact.")] = False,
    dtype: DTypeOption = DType.auto,
    device: DeviceOption = "cpu",
    json: JsonFlag = False,
) -> None:
    """Learn codebooks and write an artefact. Resumes from OUT.partial where it was interrupted."""
    from vqkv.artefact import FILES
    from vqkv.calibration import calibrate as run
    from vqkv.calibration import check_context, read_text
    from vqkv.folders import check_free
    from vqkv.models import load_config
    from vqkv.scheme_files import load_scheme

    # Whatever a look at the arguments can tell is told before the model is loaded.
    check_free(out, FILES, overwrite=force)
    loaded = load_scheme(scheme)
    texts = [read_text(path) for path in text]
    check_context(load_config(model), context)
    network, tokenizer = open_model(model, dtype, device)
    with progress_bars() as report:
        result = run(
            network,
            tokenizer,
            loaded,
            texts,
            tokens=tokens,
            out=out,
            seed=seed,
            context=context,
            overwrite=force,
            progress=report,
        ).to_dict()
    if json:
        print_json(result)
        return
    print_facts(
        {
            "artefact": out,
            "bits per value": result["bits_per_value"],
            "side bytes": bytes_for_people(result["side_bytes"]),
            "seconds to capture": result["seconds_capture"],
            "seconds to learn": result["seconds_learn"],
            "peak memory": bytes_for_people(result["peak_rss_bytes"]),
            "codebook health": result["health"],
        },
        title=f"{loaded.name} calibrated on {model}",
    )
