"""What a command works with: a model, and an artefact or a data-free scheme by name."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vqkv.cli.progress import spinner
from vqkv.errors import SchemeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from vqkv.compressor import KVCompressor


class DType(StrEnum):
    """The type that a model runs in, and so the type of what its cache keeps exactly."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[
    str, typer.Argument(help="A hub id, a local folder, a .gguf file, or `demo`.", metavar="MODEL")
]
DTypeOption = Annotated[
    DType, typer.Option("--dtype", help="Type to run the model in; auto: as it is stored.")
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="Where to run the model, as torch names it: cpu, cuda:0.")
]
CompressorOption = Annotated[
    Path | None, typer.Option("--compressor", help="Artefact that `vqkv calibrate` wrote.")
]
SchemeOption = Annotated[
    str | None, typer.Option("--scheme", help="Preset or YAML file that needs no calibration.")
]
CalibrateOnOption = Annotated[
    list[Path] | None,
    typer.Option(help="Text to calibrate on; repeat for several. The bundled mix if left out."),
]
CalibrationTokensOption = Annotated[
    int, typer.Option(min=1, help="Tokens to calibrate on, split over the texts.")
]
ScoredTokensOption = Annotated[int, typer.Option(min=2, help="Tokens to score on, per text.")]
SkipOption = Annotated[int, typer.Option(min=0, help="Tokens to skip at each text's start.")]
SeedOption = Annotated[
    int, typer.Option(min=0, max=2**32 - 1, help="All randomness follows from it.")
]
ContextOption = Annotated[int, typer.Option(min=2, help="Tokens of a window.")]


def open_model(
    name: str, dtype: DType, device: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model asked for, and its tokenizer. Raises ModelError."""
    import torch

    from vqkv.models import load_model

    with spinner(f"loading {name}"):
        return load_model(
            name, dtype="auto" if dtype == "auto" else getattr(torch, dtype), device=device
        )


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
