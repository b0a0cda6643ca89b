from __future__ import annotations

import json
from itertools import count
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.tiny_checkpoint import save_tiny_checkpoint
from tests.tiny_models import tiny_model
from vqkv.benchmarks import cpu
from vqkv.benchmarks.attend import attend_case
from vqkv.benchmarks.decoding import decoding_cases
from vqkv.benchmarks.timing import medians
from vqkv.cli import app
from vqkv.compressor import KVCompressor
from vqkv.geometry import Geometry
from vqkv.kernels import native
from vqkv.scheme_files import load_scheme

needs_compiled = pytest.mark.skipif(
    not native.available(), reason="the package was built without a C compiler"
)


def test_medians_are_of_all_rounds_but_the_first() -> None:
    ticks = count()
    seen: list[str] = []
    works = {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}
    assert medians(works, 2, lambda: float(next(ticks))) == {"a": 1.0, "b": 1.0}
    assert seen == ["a", "b"] * 3


@needs_compiled
@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize(("dim", "stages"), [(4, 1), (8, 2)])
def test_both_arms_compute_the_same_attention(rope: str, dim: int, stages: int) -> None:
    found = attend_case(192, rope, dim, stages, threads=1, rounds=1)
    assert found["bits_per_value"] == 2
    assert found["attend_rel_rms"] < 2e-2
    assert found["best_baseline_rel_rms"] < 2e-2


@needs_compiled
def test_the_command_prints_its_figures_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "ENCODE", ((16, 4, 16),))
    monkeypatch.setattr(cpu, "ATTEND", ((64, "post", 4, 1),))
    monkeypatch.setattr(cpu, "DECODE", ((16, 4),))
    result = CliRunner().invoke(app, ["bench", "cpu", "--threads", "2", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["machine"]["threads"] == 2
    assert found["clock"] == "perf_counter"
    assert found["attend"][0]["attend_speedup_vs_best"] > 0
    assert found["decode"][0]["decode_bandwidth_fraction"] > 0
    assert found["encode"][0]["codewords"] == 16
    shown = CliRunner().invoke(app, ["bench", "cpu"])
    assert "attend speedup vs best" in shown.output


def test_steps_of_a_model_are_timed_with_all_three_caches(tmp_path: Path) -> None:
    checkpoint = save_tiny_checkpoint(tmp_path / "model")
    compressor = KVCompressor(load_scheme("scalar-4bit"), Geometry.from_model(tiny_model("llama")))
    rows = decoding_cases(str(checkpoint), compressor, contexts=(24, 10**6), steps=3, run=2)
    # Contexts beyond the model's positions are left out.
    assert [(row["dtype"], row["context"]) for row in rows] == [("float32", 24), ("bfloat16", 24)]
    for row in rows:
        steps = row["compressed_ms"], row["dynamic_ms"], row["static_ms"]
        assert row["tokens_per_second"] == 1000 / steps[0]
        assert row["tokens_per_second_exact"] == 1000 / min(steps[1:])
        assert min(row[f"{part}_ms"] for part in ("products", "attention", "rest")) > 0
        assert (row["scheme"], row["read"]) == ("scalar-4bit", "decode")
