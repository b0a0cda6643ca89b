from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vqkv.codebooks.kmeans import KMeans

from .data import mixture

RANK = """
import sys, torch, torch.distributed
from vqkv.codebooks.ema import EMA
from vqkv.codebooks.kmeans import KMeans
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
)
x, start = torch.load(f"{folder}/data.pt")
x = x[:1300] if rank == 0 else x[1300:]
# Another start on rank 1, and other seeds below, show that rank 0's count.
fitted = KMeans(iterations=10).fit(x, start.shape[1], init=start if rank == 0 else -start)
dead = torch.cat([start[:, :8], start[:, :8] + 1e3], 1)
drawn = KMeans(iterations=3).fit(x, 16, seed=rank)
revived = KMeans(iterations=3).fit(x, 16, init=dead, seed=rank)
streamed = KMeans().partial_fit(x[:500], 16).partial_fit(x[500:], 16)
moving = EMA(steps=4, batch=400).fit(x, 16)
torch.save(
    {
        "inertia": fitted.health_[0].inertia,
        "books": [each.codewords_ for each in (fitted, drawn, revived, streamed, moving)],
        "streamed": streamed.statistics_.counts.sum(1),
    },
    f"{folder}/rank{rank}.pt",
)
torch.distributed.destroy_process_group()
"""


def test_two_ranks_learn_what_one_process_would(tmp_path: Path) -> None:
    x = mixture(2000, 3, 4)
    start = x[:32].transpose(0, 1).contiguous()
    start[:, :2] = 1e3  # dead codewords are revived alike on both ranks
    torch.save((x, start), tmp_path / "data.pt")
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)])
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    one = KMeans(iterations=10).fit(x, 32, init=start)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert first["inertia"] == pytest.approx(one.health_[0].inertia, rel=1e-5)
    assert first["inertia"] == second["inertia"]
    assert first["streamed"].tolist() == [2000, 2000, 2000]
    for ours, theirs in zip(first["books"], second["books"], strict=True):
        assert torch.equal(ours, theirs)
