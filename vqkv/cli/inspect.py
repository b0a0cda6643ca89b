"""`vqkv inspect`: what an artefact holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vqkv.cli.output import JsonFlag, print_facts, print_json


def inspect(
    folder: Annotated[Path, typer.Argument(help="Artefact that `vqkv calibrate` wrote.")],
    json: JsonFlag = False,
) -> None:
    """Check an artefact and show its scheme, its origin, its bytes and its codebooks' health."""
    from vqkv.artefact import read_config
    from vqkv.compressor import KVCompressor
    from vqkv.errors import ArtefactError

    if not folder.is_dir():
        raise ArtefactError(f"{folder}: no such folder")
    stored = read_config(folder)
    report = KVCompressor.from_pretrained(folder).report()
    result = {
        **report,
        "base_model": stored["base_model"],
        "calibration": stored["calibration"],
        "geometry": stored["geometry"],
        "library_version": stored["library_version"],
    }
    if json:
        print_json(result)
    else:
        streams = len(result.pop("streams"))
        print_facts({**result, "streams": streams}, title=str(folder))
