"""Comparisons: the same figures as `evaluate`, kept and gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_text, tiny_tokenizer
from tests.tiny_models import tiny_model
from vqkv.calibration import calibrate
from vqkv.cli import app
from vqkv.compressor import KVCompressor
from vqkv.errors import StateError, TextError
from vqkv.evaluation import compare as module
from vqkv.evaluation import evaluate
from vqkv.evaluation.compare import Settings, coding_times, compare
from vqkv.evaluation.comparison import markdown
from vqkv.geometry import Geometry
from vqkv.scheme import Scheme
from vqkv.scheme_files import load_scheme, scheme_from_dict

STREAM = {
    "grouping": {"type": "contiguous", "dim": 4},
    "quantizer": {"type": "product", "code_bits": 4, "learner": {"type": "kmeans"}},
}
LEARNED = {"name": "learned", "keys": {"rope": "pre", **STREAM}, "values": STREAM}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VQKV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Path]:
    made = {name: tmp_path / f"{name}.txt" for name in ("a", "b", "c")}
    for seed, path in enumerate(made.values()):
        path.write_text(tiny_text(400, seed=seed))
    return made


def settings(texts: dict[str, Path], **changes: Any) -> Settings:
    given = {"calibration_tokens": 256, "tokens": 128, "skip": 10, "context": 64, "passages": 0}
    return Settings(calibration_texts=(texts["a"],), **{**given, **changes})


def schemes() -> list[Scheme]:
    return [scheme_from_dict(LEARNED), load_scheme("scalar-4bit")]


def test_rows_are_what_calibrate_and_evaluate_give(texts: dict[str, Path], tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    scored = [texts["b"], texts["c"]]
    rows = list(compare(model, tokenizer, schemes(), scored, settings(texts)))
    found = [(r.evaluation["scheme"], r.evaluation["text"]) for r in rows]
    assert found == [(s, t) for s in ("learned", "scalar-4bit") for t in ("b.txt", "c.txt")]
    assert rows[0].seconds_learn is not None and rows[2].seconds_learn is None
    compressor = calibrate(
        model, tokenizer, schemes()[0], [texts["a"]], tokens=256, context=64, out=tmp_path / "x"
    ).compressor
    alone = evaluate(
        model, tokenizer, compressor, texts["b"], tokens=128, context=64, skip=10, passages=0
    )
    assert rows[0].evaluation["kl"] == alone.kl
    assert rows[0].evaluation["side_bytes"] == alone.side_bytes


def test_what_is_done_is_not_done_again(
    texts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    arguments = (model, tokenizer, schemes())
    first = next(compare(*arguments, [texts["b"]], settings(texts)))  # then interrupted
    calibrations: list[str] = []
    evaluations: list[str] = []

    def counted_calibrate(*args: Any, **kwargs: Any) -> Any:
        calibrations.append(args[2].name)
        return calibrate(*args, **kwargs)

    def counted_evaluate(*args: Any, **kwargs: Any) -> Any:
        evaluations.append(args[2].scheme.name)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(module, "calibrate", counted_calibrate)
    monkeypatch.setattr(module, "evaluate", counted_evaluate)
    again = list(compare(*arguments, [texts["b"]], settings(texts)))
    assert again[0] == first
    assert (calibrations, evaluations) == ([], ["scalar-4bit"])
    list(compare(*arguments, [texts["c"]], settings(texts)))
    assert (calibrations, evaluations[1:]) == ([], ["learned", "scalar-4bit"])
    list(compare(*arguments, [texts["b"]], settings(texts, calibration_tokens=200)))
    assert calibrations == ["learned"]


def test_texts_are_checked_before_anything_is_learned(texts: dict[str, Path], cache: Path) -> None:
    texts["c"].write_text(tiny_text(40))
    scored = [texts["b"], texts["c"]]
    with pytest.raises(TextError, match=r"c\.txt"):
        list(compare(tiny_model("llama"), tiny_tokenizer(), schemes(), scored, settings(texts)))
    assert not cache.exists()


def test_a_model_that_is_refused_leaves_nothing(texts: dict[str, Path], cache: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(StateError, match="hold nan"):
        list(compare(model, tiny_tokenizer(), schemes(), [texts["b"]], settings(texts)))
    assert not list((cache / "compare").iterdir())


def test_a_refused_scheme_leaves_what_was_captured(texts: dict[str, Path], cache: Path) -> None:
    many = {**STREAM, "quantizer": {**STREAM["quantizer"], "code_bits": 10}}
    refused = scheme_from_dict({**LEARNED, "keys": {"rope": "pre", **many}})
    with pytest.raises(StateError, match="1024"):
        list(
            compare(tiny_model("llama"), tiny_tokenizer(), [refused], [texts["b"]], settings(texts))
        )
    assert [path.name[:7] for path in (cache / "compare").iterdir()] == ["states-"]


def test_logits_that_a_killed_process_left_go(cache: Path) -> None:
    left = cache / "compare" / "exact-left"
    left.mkdir(parents=True)
    (left / "logits.npy").write_bytes(b"large")
    with module._scratch(left.parent) as one, module._scratch(left.parent) as other:
        assert one.exists() and other.exists() and not left.exists()
    assert not list(left.parent.iterdir())


def test_times_grow_with_the_work() -> None:
    geometry = Geometry.from_model(tiny_model("llama"))
    encode, decode = coding_times(KVCompressor(load_scheme("scalar-2bit"), geometry))
    assert encode > 0 and decode > 0


def test_the_command(texts: dict[str, Path], tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path / "model")
    arguments = [
        *("compare", tmp_path / "model", "--scheme", "scalar-4bit", "--scheme", "scalar-1bit"),
        *("--text", texts["b"], "--tokens", 128, "--context", 64, "--skip", 0, "--passages", 0),
        *("--out", tmp_path / "out"),
    ]
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    # On random weights destroyed codes change little, so the canary fails, as it should.
    assert result.exit_code == 3, result.stderr
    data = json.loads(result.stdout)
    assert [row["evaluation"]["scheme"] for row in data["rows"]] == ["scalar-4bit", "scalar-1bit"]
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == data
    table = (tmp_path / "out" / "comparison.md").read_text()
    assert table == markdown(data)
    assert table.count("| `scalar-") == 2
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    refused = CliRunner().invoke(app, list(map(str, arguments)))
    assert refused.exit_code == 2 and "thesis.tex" in refused.stderr
