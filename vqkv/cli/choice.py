"""Which compressor a command works with: a calibrated artefact, or a data-free scheme by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vqkv.errors import SchemeError

if TYPE_CHECKING:
    from vqkv.compressor import KVCompressor

Model = Annotated[
    str, typer.Argument(help="A hub id, a local folder, a .gguf file, or `demo`.", metavar="MODEL")
]
CompressorOption = Annotated[
    Path | None, typer.Option("--compressor", help="Artefact that `vqkv calibrate` wrote.")
]
SchemeOption = Annotated[
    str | None, typer.Option("--scheme", help="Preset or YAML file that needs no calibration.")
]


def choose_compressor(
    folder: Path | None,
    scheme: str | None,
    config: Any,
    sinks: int | None = None,
    window: int | None = None,
) -> KVCompressor:
    """The compressor asked for, checked against the model, with its residency changed if asked.

    Raises:
        SchemeError: neither or both were given, or the scheme needs calibration.
        ArtefactError: the artefact is damaged or made for another model.
    """
    from vqkv.compressor import KVCompressor
    from vqkv.geometry import Geometry
    from vqkv.scheme_files import load_scheme

    if (folder is None) == (scheme is None):
        raise SchemeError("give either --compressor DIR or --scheme NAME")
    if folder is not None:
        compressor = KVCompressor.from_pretrained(folder, config)
    else:
        assert scheme is not None
        loaded = load_scheme(scheme)
        if not loaded.data_free:
            raise SchemeError(
                f"scheme {loaded.name!r} learns from data: run `vqkv calibrate MODEL --scheme "
                f"{scheme} --text FILE --tokens N --out DIR` and pass --compressor DIR"
            )
        compressor = KVCompressor(loaded, Geometry.from_config(config))
    return compressor.with_residency(sinks=sinks, window=window)
