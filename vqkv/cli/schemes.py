"""`vqkv schemes`: list, show and check schemes, and export their JSON schema."""

from __future__ import annotations

import json as jsonlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from vqkv.cli.output import JsonFlag, print_facts, print_json, print_table

app = typer.Typer(no_args_is_help=True, help="List, show and check schemes.")


@app.command("list")
def list_schemes(json: JsonFlag = False) -> None:
    """Every preset, with what it is."""
    from vqkv.scheme_files import load_scheme, preset_names

    presets = [load_scheme(name) for name in preset_names()]
    if json:
        print_json(
            {
                "schemes": [
                    {"name": s.name, "description": s.description, "data_free": s.data_free}
                    for s in presets
                ]
            }
        )
    else:
        print_table(["name", "description"], [(s.name, s.description) for s in presets])


@app.command("show")
def show_scheme(
    name: Annotated[str, typer.Argument(help="Preset or YAML file.")], json: JsonFlag = False
) -> None:
    """A scheme with everything it leaves to defaults or extends, as YAML."""
    import yaml

    from vqkv.scheme_files import load_scheme

    scheme = load_scheme(name)
    if json:
        print_json({**scheme.to_dict(), "fingerprint": scheme.fingerprint()})
    else:
        sys.stdout.write(yaml.safe_dump(scheme.to_dict(), sort_keys=False))


@app.command("validate")
def validate_scheme(
    file: Annotated[Path, typer.Argument(help="YAML file.")], json: JsonFlag = False
) -> None:
    """Check a scheme file; says what is wrong and where.

    Whether a model has the shape for it, `vqkv plan MODEL --scheme FILE` says.
    """
    from vqkv.scheme_files import load_scheme

    scheme = load_scheme(file)
    facts = {
        "valid": True,
        "name": scheme.name,
        "data_free": scheme.data_free,
        "fingerprint": scheme.fingerprint(),
    }
    if json:
        print_json(facts)
    else:
        print_facts(facts)


@app.command("schema")
def schema(json: JsonFlag = False) -> None:
    """The JSON schema of scheme files, plugins included, for an editor to check against."""
    from vqkv.scheme_files import scheme_schema

    if json:
        print_json(scheme_schema())
    else:
        sys.stdout.write(jsonlib.dumps(scheme_schema(), indent=2) + "\n")
