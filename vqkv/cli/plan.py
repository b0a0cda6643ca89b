"""`vqkv plan`: what fits into a given memory, from configs alone."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated

import typer

from vqkv.cli.choice import Model
from vqkv.cli.output import JsonFlag, bytes_for_people, print_facts, print_json
from vqkv.errors import VQKVError
from vqkv.registry import short

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

#: Without a unit less than any model takes, and more than any machine has: slips.
_LEAST, _MOST = 10**6, 10**18


def plan(
    model: Model,
    scheme: Annotated[str, typer.Option(help="Preset or YAML file.")],
    memory: Annotated[str, typer.Option(help="Memory in all, such as 24GB or 22.5GiB.")],
    context: Annotated[
        int | None, typer.Option(min=1, help="Also say what this many tokens take.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    json: JsonFlag = False,
) -> None:
    """Bytes per token and the longest context, with 16-bit weights and cache counted."""
    from vqkv.models import load_config
    from vqkv.planning import plan as run
    from vqkv.scheme_files import load_scheme

    result = run(
        load_config(model), load_scheme(scheme), parse_memory(memory), batch=batch, context=context
    ).to_dict()
    if json:
        print_json(result)
        return
    print_facts(
        {
            name.replace("_", " "): bytes_for_people(value) if "bytes" in name else value
            for name, value in result.items()
            if value is not None
        },
        title=f"{scheme} on {model}",
    )


def parse_memory(text: str) -> int:
    """Bytes of `24GB`, `22.5 GiB`, `800M`, or a bare count from a million on. Raises VQKVError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(I?)B?\s*", text.upper())
    if match is None or (match[3] and not match[2]):
        raise VQKVError(f"--memory: a size such as 24GB or 22.5GiB, given {short(text)}")
    power = " KMGT".index(match[2] or " ")
    # Decimals neither round 22.1 nor overflow.
    size = Decimal(match[1]) * (1024**power if match[3] else _UNITS[match[2]])
    if not match[2] and size < _LEAST:
        raise VQKVError(f"--memory: {size:g} bytes hold no model: give a size such as {match[1]}GB")
    if size > _MOST:
        raise VQKVError(f"--memory: at most {_MOST // 10**12:,}TB, given {short(text)}")
    return int(size)
