"""The `vqkv` command. Each command imports what it needs when it runs, so `--help` is quick."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vqkv.cli import (
    bench,
    calibrate,
    compare,
    demo,
    evaluate,
    generate,
    inspect,
    plan,
    schemes,
    tune,
)
from vqkv.cli.output import fail
from vqkv.errors import VQKVError


class Commands(TyperGroup):
    """Turns errors that a user can mend into one message on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (VQKVError, OSError) as error:
            fail(str(error))
        except KeyboardInterrupt:
            fail("interrupted", code=130)


def show_version(wanted: bool) -> None:
    """Print it and stop, where it was asked for."""
    if wanted:
        from vqkv.version import __version__

        typer.echo(__version__)
        raise typer.Exit


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Vector-quantized KV caches: calibrate a scheme, measure it, generate with it.",
)


@app.callback(help=app.info.help)
def common(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print it and exit.", is_eager=True, callback=show_version),
    ] = False,
) -> None:
    """What stands before any command."""


app.command("demo")(demo.demo)
app.command("calibrate")(calibrate.calibrate)
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("tune")(tune.tune)
app.command("generate")(generate.generate)
app.command("plan")(plan.plan)
app.command("inspect")(inspect.inspect)
app.add_typer(schemes.app, name="schemes")
app.add_typer(bench.app, name="bench")
