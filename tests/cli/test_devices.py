"""Commands on a model where it is told to run; on a GPU by `tests/kernels/test_on_gpu.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_text
from vqkv.cli import app

#: Learned with gradients, and distilled.
SCHEME = """
schema_version: 1
name: tiny-fast
extends: fast-2bit
keys:
  transforms: [{type: pair_metric, metric: fisher, dim: 4, code_bits: 3}]
  quantizer: {code_bits: 3}
values: {quantizer: {code_bits: 3}}
"""


def calibrated_and_evaluated(folder: Path, device: str) -> float:
    """KL of a tiny model's scheme, both commands on a device."""
    save_tiny_checkpoint(folder / "model")
    (folder / "scheme.yaml").write_text(SCHEME)
    for seed, name in enumerate(("a.txt", "b.txt")):
        (folder / name).write_text(tiny_text(1200, seed=seed))
    common = ("--context", 64, "--device", device, "--json")
    artefact = folder / device
    calibrated = CliRunner().invoke(
        app,
        [
            *("calibrate", str(folder / "model"), "--scheme", str(folder / "scheme.yaml")),
            *("--text", str(folder / "a.txt"), "--tokens", "512", "--out", str(artefact)),
            *map(str, common),
        ],
    )
    assert calibrated.exit_code == 0, calibrated.stderr
    evaluated = CliRunner().invoke(
        app,
        [
            *("evaluate", str(folder / "model"), "--compressor", str(artefact)),
            *("--text", str(folder / "b.txt"), "--tokens", "256", "--passages", "0"),
            *("--no-canary", *map(str, common)),
        ],
    )
    assert evaluated.exit_code == 0, evaluated.stderr
    kl: float = json.loads(evaluated.stdout)["kl"]
    return kl


def test_an_artefact_of_one_run_scores_like_that_of_another(tmp_path: Path) -> None:
    first, second = (calibrated_and_evaluated(tmp_path / str(i), "cpu") for i in range(2))
    assert first == pytest.approx(second, rel=1e-3) and first > 0
