"""Time and quality of k-means: backends from one start, and ways to start.

    python benchmarks/learners.py --streams 60 --out benchmarks/results/learners.json

The figure to hold: 60 streams of 16,384 tokens x 48 subspaces of dim 4 (SmolLM2-135M's keys and
values under cq-4c8b), K = 256 and 20 iterations, in at most 60 s on 2 cores, with a final inertia
within 1 % of scikit-learn's from the same start.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vqkv.codebooks.kmeans import KMeans
from vqkv.codebooks.starts import plus_plus
from vqkv.kernels import native
from vqkv.provenance import write

TOKENS, SUBSPACES, DIM, CODEWORDS, ITERATIONS, STREAMS = 16384, 48, 4, 256, 20, 60


def timed(work: Callable[[], KMeans]) -> tuple[float, KMeans]:
    """Seconds, and what was learned."""
    start = time.perf_counter()
    learner = work()
    return time.perf_counter() - start, learner


def backends(x: torch.Tensor, names: list[str]) -> list[dict[str, Any]]:
    """Each backend on one stream from the same start."""
    start = plus_plus(x, CODEWORDS, None, torch.Generator().manual_seed(0))
    rows: list[dict[str, Any]] = []
    for name in track(names, "backends", transient=True):
        learner = KMeans(iterations=ITERATIONS, backend=name)
        learner.fit(x[:512, :2], 16)  # imports and thread pools are not what is measured
        seconds, _ = timed(lambda learner=learner: learner.fit(x, CODEWORDS, init=start))  # type: ignore[misc]
        rows.append(
            {"backend": name, "seconds": seconds, "inertia": learner.health_[0].inertia[-1]}
        )
    reference = {row["backend"]: row["inertia"] for row in rows}.get("sklearn")
    for row in rows:
        row["seconds_60_streams"] = row["seconds"] * STREAMS
        row["over_sklearn"] = None if reference is None else row["inertia"] / reference - 1
    return rows


def streams(count: int) -> dict[str, Any]:
    """Whole fits, start included, of many streams by the default settings."""
    seconds = []
    for seed in track(range(count), "streams", transient=True):
        x = torch.randn(TOKENS, SUBSPACES, DIM, generator=torch.Generator().manual_seed(seed))
        took, _ = timed(
            lambda x=x, seed=seed: KMeans(iterations=ITERATIONS).fit(x, CODEWORDS, seed=seed)  # type: ignore[misc]
        )
        seconds.append(took)
    return {
        "streams": count,
        "seconds": sum(seconds),
        "seconds_60_streams": sum(seconds) / count * STREAMS,
        "slowest": max(seconds),
    }


def correlated(generator: torch.Generator, subspaces: int) -> torch.Tensor:
    """Gaussians whose channels are correlated and of unequal variance."""
    scales = torch.tensor([3.0, 1.0, 0.5, 0.2])
    mixing = torch.randn(subspaces, DIM, DIM, generator=generator) * scales
    x = torch.randn(TOKENS, subspaces, DIM, generator=generator)
    return torch.einsum("nmd,mde->nme", x, mixing)


def mixed(generator: torch.Generator, subspaces: int) -> torch.Tensor:
    """40 Gaussians of unequal size and spread."""
    middles = 4 * torch.randn(subspaces, 40, DIM, generator=generator)
    spread = 0.05 + 0.6 * torch.rand(subspaces, 40, 1, generator=generator)
    size = torch.rand(subspaces, 40, generator=generator).pow(3)
    component = torch.multinomial(size, TOKENS, True, generator=generator).t()
    subspace = torch.arange(subspaces)
    noise = torch.randn(TOKENS, subspaces, DIM, generator=generator)
    return middles[subspace, component] + spread[subspace, component] * noise


def with_outliers(generator: torch.Generator, subspaces: int) -> torch.Tensor:
    """Gaussians with one vector in a hundred 20 times as long."""
    x = torch.randn(TOKENS, subspaces, DIM, generator=generator)
    far = torch.rand(TOKENS, subspaces, 1, generator=generator) < 0.01
    return torch.where(far, 20 * x, x)


def gaussian(generator: torch.Generator, subspaces: int) -> torch.Tensor:
    """Independent standard Gaussians."""
    return torch.randn(TOKENS, subspaces, DIM, generator=generator)


def starts(subspaces: int, seeds: int) -> list[dict[str, Any]]:
    """Final inertia from either start, mean over seeds."""
    rows = []
    for make in track(
        (gaussian, correlated, mixed, with_outliers), "ways to start", transient=True
    ):
        x = make(torch.Generator().manual_seed(0), subspaces)
        row: dict[str, Any] = {"data": make.__name__}
        for init in ("random", "kmeans++"):
            runs = [
                timed(
                    lambda x=x, init=init, seed=seed: KMeans(  # type: ignore[misc]
                        iterations=ITERATIONS, init=init
                    ).fit(x, CODEWORDS, seed=seed)
                )
                for seed in range(seeds)
            ]
            row[init] = sum(run.health_[0].inertia[-1] for _, run in runs) / seeds
            row[f"{init} seconds"] = sum(seconds for seconds, _ in runs) / seeds
        row["ratio"] = row["kmeans++"] / row["random"]
        rows.append(row)
    return rows


def show(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table."""
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name)
    for row in rows:
        table.add_row(*(f"{v:.5g}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=3, help="whole streams to fit by default")
    parser.add_argument("--subspaces", type=int, default=SUBSPACES, help="of the backends' stream")
    parser.add_argument("--start-subspaces", type=int, default=8, help="for the ways to start")
    parser.add_argument("--seeds", type=int, default=2, help="for the ways to start")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/learners.json"))
    arguments = parser.parse_args()

    names = ["native"] if native.available() else []
    x = torch.randn(TOKENS, arguments.subspaces, DIM, generator=torch.Generator().manual_seed(0))
    result: dict[str, Any] = {
        "native": native.unavailable_reason() or "available",
        "backends": backends(x, [*names, "torch", "faiss", "sklearn"]),
        "streams": streams(arguments.streams),
        "starts": starts(arguments.start_subspaces, arguments.seeds),
    }
    console = Console()
    show(console, f"One stream of {arguments.subspaces} subspaces, same start", result["backends"])
    show(console, "Whole fits by the default settings", [result["streams"]])
    show(console, f"Inertia after {ITERATIONS} iterations", result["starts"])
    write(arguments.out, result)


if __name__ == "__main__":
    main()
