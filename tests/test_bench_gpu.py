"""The GPU benchmark, end to end in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vqkv.kernels import gpu

ROOT = Path(__file__).parents[1]


def figures_of(module: str, out: Path) -> dict[str, Any]:
    """What a dry run writes."""
    run = subprocess.run(
        [sys.executable, "-m", module, "--dry", "--out", str(out)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert run.returncode == 0, run.stderr
    figures: dict[str, Any] = json.loads(out.read_text())
    return figures


@pytest.mark.slow
@pytest.mark.skipif(not gpu.installed(), reason="Triton is not installed")
def test_every_part_runs_and_is_right(tmp_path: Path) -> None:
    figures = figures_of("benchmarks.gpu", tmp_path / "gpu.json")
    assert figures["complete"] and figures["versions"]["triton"]
    assert {"ceilings", "gathers", "capacity"} <= figures.keys()
    assert all(row["finite"] for row in figures["step"])
    assert {row["arm"] for row in figures["rest"]} == {"triton", "naive"}
    assert max(row["error"] for row in figures["rest"]) < 1e-5
    assert max(row["gap"] for row in figures["encode"]) < 1e-4
    attended = {row["arm"]: row["error"] for row in figures["attend"]}
    assert {"d4", "d4-rope-key-sums", "d8-x2", "fp16-split-kv", "sdpa-math"} <= attended.keys()
    assert max(attended.values()) < 2e-3


@pytest.mark.slow
def test_generation_is_timed_with_and_without_graphs(tmp_path: Path) -> None:
    figures = figures_of("benchmarks.gpu.generation", tmp_path / "generation.json")
    replayed = {row["arm"]: row["replayed"] for row in figures["generation"]}
    assert replayed["exact"] == replayed["fast-2bit"] == 0
    assert replayed["fast-2bit, graphs"] > 90
    assert all(row["tokens_per_s"] > 0 for row in figures["generation"])
