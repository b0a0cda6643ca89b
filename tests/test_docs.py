"""The documents say what the code says."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_checkpoint import tiny_tokenizer
from tests.tiny_models import tiny_model
from vqkv.scheme_files import load_scheme

ROOT = Path(__file__).parent.parent


def tool(name: str) -> Any:
    """A script of `tools/` as a module; it may import those beside it."""
    if str(ROOT / "tools") not in sys.path:
        sys.path.insert(0, str(ROOT / "tools"))
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_table_that_is_new_takes_nothing_but_its_line() -> None:
    module = tool("results_pages")
    page = "<!-- streams: none -->\n\nProse.\n\n<!-- frontier -->\n\nOld.\n\n<!-- end -->\n"
    once = module.with_streams(page)
    assert "\n\nProse.\n\n<!-- frontier -->\n\nOld.\n\n<!-- end -->\n" in once
    assert module.with_streams(once) == once


def test_config_reference_is_current() -> None:
    reference = tool("config_reference").reference()
    assert (ROOT / "docs" / "configs.md").read_text(encoding="utf-8") == reference, (
        "docs/configs.md is out of date: run `make docs`"
    )


def test_the_page_of_models_is_of_the_committed_results() -> None:
    module = tool("models_page")
    written = module.page(json.loads(module.RESULTS.read_text()))
    assert module.PAGE.read_text() == written, "python tools/models_page.py"


def test_measured_figures_are_those_of_the_committed_results() -> None:
    module = tool("results_pages")
    for path, text in module.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path} is out of date: run `make docs`"


def test_the_published_figure_beside_a_preset_is_the_nearest_in_kind() -> None:
    shown = tool("results_pages").as_published

    def entry(dataset: str, metric: str, exact: float | None = 5.0) -> dict[str, Any]:
        fields = {"preset": "cq", "model": "M", "dataset": dataset, "metric": metric}
        return {**fields, "exact": exact, "value": 6.25, "tag": "P"}

    entries = [entry("GSM8K", "accuracy", None), entry("LongBench", "score")]
    assert shown(entries[:1], "cq") == "GSM8K ? → 6.25, M (P)"
    assert shown(entries, "cq") == "LongBench 5 → 6.25, M (P)"
    entries += [entry("C4", "perplexity"), entry("WikiText-2", "perplexity")]
    assert shown(entries[:3], "cq") == "C4 perplexity 5 → 6.25, M (P)"
    assert shown(entries, "cq") == "WikiText-2 perplexity 5 → 6.25, M (P)"
    assert shown(entries, "kivi") == ""


def test_published_figures_name_presets_that_exist() -> None:
    presets = {path.stem for path in (ROOT / "vqkv" / "presets").glob("*.yaml")}
    named = {entry["preset"] for entry in tool("results_pages").published()}
    assert named - {None} <= presets


def test_peers_are_marked_with_the_package_that_does_the_work() -> None:
    module = tool("results_pages")
    (path,) = (ROOT / "benchmarks" / "results" / "compare").glob("cq-4c8b.json")
    ours = json.loads(path.read_text(encoding="utf-8"))
    theirs = copy.deepcopy(ours) | {"peer": "faiss-cpu 1.2.3"}
    for row in theirs["rows"]:
        row["evaluation"]["scheme"] = "pq"
    page = module.table(module.rows_of([ours, theirs]))
    assert page.count("| `pq` (peer: faiss-cpu 1.2.3) |") == len(theirs["rows"])
    assert page.count("| `cq-4c8b` |") == len(ours["rows"])


def test_the_first_example_runs_as_it_stands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    small = (tiny_model("llama"), tiny_tokenizer())
    monkeypatch.setattr("vqkv.models.load_model", lambda name: small)
    exec(example, {})
    assert "'total': " in capsys.readouterr().out


def test_diffs_for_contributors_are_what_the_files_hold() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    parts = re.findall(r"^\+\+\+ (\S+)\n((?:\+(?!\+\+ ).*\n)+)", text, flags=re.MULTILINE)
    assert {path for path, _ in parts} >= {"vqkv/presets/vecinfer-2.yaml"}
    for path, added in parts:
        lines = re.sub(r"^\+", "", added, flags=re.MULTILINE)
        assert lines in (ROOT / path).read_text(encoding="utf-8"), f"{path} reads otherwise"


def test_links_in_documents_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("examples/*/*.md")]
    assert pages
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize(
    "file",
    sorted([*ROOT.glob("benchmarks/schemes/*.yaml"), *ROOT.glob("examples/schemes/*.yaml")]),
    ids=lambda file: file.stem,
)
def test_schemes_of_benchmarks_and_examples_load_under_their_file_s_name(file: Path) -> None:
    assert load_scheme(file).name == file.stem


def test_other_calibrations_are_set_beside_the_usual_one() -> None:
    calibrations = tool("results_pages").calibrations

    def compared(tokens: int, seed: int, kl: dict[str, float]) -> dict[str, Any]:
        common = {"tokens": 8, "context": 4, "sinks": 4, "skip": 0}
        rows = [{"evaluation": {"scheme": n, "text": "a.txt", "kl": x}} for n, x in kl.items()]
        return {"settings": {"calibration_tokens": tokens, "seed": seed, **common}, "rows": rows}

    usual = compared(32768, 0, {"x": 0.1, "y": 0.2, "z": 0.3})
    assert calibrations([usual], []) == ""
    fits = [compared(8192, 0, {"y": 0.25, "x": 0.15}), compared(32768, 1, {"x": 0.11})]
    page = calibrations([usual], fits)
    assert "They stand in the same order in each." in page
    assert page.splitlines()[-4:] == [
        "| preset | text | 8,192 | 32,768 | 32,768, seed 1 |",
        "| --- | --- | --- | --- | --- |",
        "| `x` | a | 0.1500 | 0.1000 | 0.1100 |",
        "| `y` | a | 0.2500 | 0.2000 |  |",
    ]
    fits[0]["rows"][0]["evaluation"]["kl"] = 0.14
    assert "Their order differs." in calibrations([usual], fits)
    fits[1]["settings"]["tokens"] = 9
    with pytest.raises(SystemExit, match="tokens differs"):
        calibrations([usual], fits)


def test_times_of_encoding_are_shown() -> None:
    tables = tool("gpu_results")
    times = {(64, "triton"): 10.0, (64, "naive"): 50.0, (999, "triton"): 2e3, (999, "naive"): 8e3}
    joint = [
        {"dim": 4, "vectors": vectors, "arm": f"joint-{kernel}", "us": us}
        for (vectors, kernel), us in times.items()
    ]
    assert tables._together(joint, "joint").endswith("| 4 | 0.01 | 5.0× | 2.00 | 4.0× |")
