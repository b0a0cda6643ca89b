"""`vqkv generate`: continue a prompt with a compressed cache."""

from __future__ import annotations

import sys
from enum import StrEnum
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
from vqkv.cli.output import JsonFlag, bytes_for_people, print_json
from vqkv.cli.progress import spinner


class Read(StrEnum):
    """How attention reads the cache."""

    auto = "auto"
    decode = "decode"
    attend = "attend"


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 64,
    compressor: CompressorOption = None,
    scheme: SchemeOption = None,
    read: Annotated[
        Read,
        typer.Option(
            help="Decode history for attention, or attend on codes; auto: attend where a fused "
            "kernel takes them."
        ),
    ] = Read.auto,
    dtype: DTypeOption = DType.auto,
    device: DeviceOption = "cpu",
    json: JsonFlag = False,
) -> None:
    """Continue a prompt greedily and say how many bytes the cache took."""
    from vqkv.generation import continue_prompt
    from vqkv.models import load_config

    chosen = choose_compressor(compressor, scheme, load_config(model))
    network, tokenizer = open_model(model, dtype, device)
    with spinner("generating"):
        result = continue_prompt(
            network, tokenizer, prompt, max_new_tokens, compressor=chosen, read=read.value
        )
    if json:
        print_json(result.to_dict())
        return
    sys.stdout.write(prompt + result.text + "\n")
    sys.stderr.write(
        f"{result.new_tokens} tokens at {result.tokens_per_second:.3g} per second; cache "
        f"{bytes_for_people(result.cache_bytes)}, exact at 16 bits "
        f"{bytes_for_people(result.cache_bytes_exact)}\n"
    )
