"""`vqkv bench`: how fast the kernels are on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from vqkv.cli.choice import CompressorOption
from vqkv.cli.output import JsonFlag, print_json, print_table, show

app = typer.Typer(no_args_is_help=True, help="Measure the kernels on this machine.")


@app.callback()
def bench() -> None:
    """Measure the kernels on this machine."""


@app.command("cpu")
def cpu(
    threads: Annotated[int, typer.Option(min=1, help="Of ours and of what we compare to.")] = 1,
    compressor: CompressorOption = None,
    model: Annotated[str, typer.Option(help="Model of the compressor.")] = "demo",
    json: JsonFlag = False,
) -> None:
    """Compiled CPU kernels against the fastest alternatives; some minutes.

    Encoding against faiss, attention on codes against dense attention, decoding against memory.
    With a compressor also decoding steps of its model, against those with exact caches.
    """
    from vqkv.benchmarks.cpu import run
    from vqkv.compressor import KVCompressor
    from vqkv.errors import KernelError
    from vqkv.kernels import native
    from vqkv.models import load_config

    if not native.available():
        raise KernelError(str(native.unavailable_reason()))
    loaded = None
    if compressor is not None:
        loaded = KVCompressor.from_pretrained(compressor, load_config(model))
    result = run(threads, model=model, compressor=loaded)
    if json:
        print_json(result)
        return
    for operation in ("encode", "attend", "decode", "steps"):
        rows = result.get(operation)
        if not rows:
            continue
        columns = [name.replace("_", " ") for name in rows[0]]
        print_table(
            columns,
            [[show(value) for value in row.values()] for row in rows],
            f"{operation}, {result['simd_level']}, threads: {threads}",
            piped_heads=True,
        )
