"""The report folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.cache.compressors import compressor_for
from tests.tiny_checkpoint import tiny_text, tiny_tokenizer
from tests.tiny_models import tiny_model
from vqkv.demo import run_demo
from vqkv.errors import ArtefactError
from vqkv.evaluation import Evaluation, evaluate
from vqkv.evaluation.report import write_report


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    text = tmp_path_factory.mktemp("report") / "a<b.txt"
    text.write_text(tiny_text(100))
    model = tiny_model("llama")
    return evaluate(
        model, tiny_tokenizer(), compressor_for(model), text, tokens=64, context=64, passages=0
    )


def write(folder: Path, evaluation: Evaluation, **changes: Any) -> None:
    given: dict[str, Any] = {
        "title": "A < B",
        "introduction": "What this is.",
        "columns": ("scheme", "KL"),
        "rows": [("<i>", "0.1")],
        "evaluations": [evaluation, replace(evaluation, bits_per_value=1.0, kl=1.0)],
        "continuations": {"exact": "x < y"},
        "data": {"kl": evaluation.kl},
        **changes,
    }
    write_report(folder, **given)


def test_it_holds_data_page_and_plot(evaluation: Evaluation, tmp_path: Path) -> None:
    write(tmp_path / "out", evaluation)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("report.json", "report.html", "plot.png")
    }
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == {"kl": evaluation.kl}
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "A &lt; B" in page and "&lt;i&gt;" in page and "x &lt; y" in page


def test_an_older_report_gives_way_and_a_failed_one_leaves_it(
    evaluation: Evaluation, tmp_path: Path
) -> None:
    write(tmp_path / "out", evaluation)
    write(tmp_path / "out", evaluation, data={"kl": 1})
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == {"kl": 1}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(tmp_path / "out", evaluation, data={"kl": float("nan")})
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == {"kl": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_nobodys_own_files_are_overwritten(evaluation: Evaluation, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtefactError, match=r"\(thesis\.tex\), which overwriting would delete"):
        write(tmp_path, evaluation)
    with pytest.raises(ArtefactError, match="which overwriting would delete"):
        run_demo(tmp_path, lambda phase, done, total: None)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
