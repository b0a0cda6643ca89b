"""Times of alternatives, taken in turn, so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Work = Callable[[], Any]


def clock(threads: int) -> Callable[[], float]:
    """Seconds: CPU time of the process on one thread, which leaves out that others had the core.

    With more threads it is wall time, since CPU time adds theirs up.
    """
    return time.process_time if threads == 1 else time.perf_counter


def seconds(work: Work, now: Callable[[], float]) -> float:
    """Of one call."""
    start = now()
    work()
    return now() - start


def medians(works: Mapping[str, Work], rounds: int, now: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each of `works` over rounds that call each once, after one to warm up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for index in range(rounds + 1):
        for name, work in works.items():
            taken = seconds(work, now)
            if index:
                times[name].append(taken)
    return {name: statistics.median(taken) for name, taken in times.items()}
