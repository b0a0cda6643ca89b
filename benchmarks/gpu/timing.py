"""Times by CUDA graphs and events, over buffers that no cache still holds."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import torch

ROUNDS = 7
#: Calls that one graph holds at least, so that starting it costs little.
CALLS = 8


def microseconds(calls: Sequence[Callable[[], Any]], graph: bool = True) -> float | None:
    """Median time of one of `calls`, each on data of its own; None where there is no GPU.

    All calls are captured into one graph, which runs a few times, or run as they are.
    """
    repeats = -(-CALLS // len(calls))
    for call in calls:
        call()
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    if not graph:
        return statistics.median(_elapsed(call) for call in (*calls, *calls, *calls))
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for _ in range(repeats):
            for call in calls:
                call()
    times = [_elapsed(captured.replay) / (repeats * len(calls)) for _ in range(ROUNDS)]
    return statistics.median(times[1:])


def _elapsed(run: Callable[[], Any]) -> float:
    """Microseconds by the GPU's clock."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return 1e3 * float(start.elapsed_time(stop))


def copies(bytes_read: int, cold_bytes: int) -> int:
    """How many sets of buffers one call after the other reads, for the first to be cold again."""
    return min(64, max(1, -(-cold_bytes // max(bytes_read, 1))))


def gpu() -> dict[str, str]:
    """Name, driver and clocks of the GPU as they are now; nothing where there is none."""
    fields = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw")
    if not torch.cuda.is_available():
        return {}
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    run = subprocess.run(query, capture_output=True, text=True, check=True)
    values = run.stdout.splitlines()[0].split(", ")
    return dict(zip(fields, values, strict=True))
