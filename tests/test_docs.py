"""The documents say what the code says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from tests.tiny_checkpoint import tiny_tokenizer
from tests.tiny_models import tiny_model

ROOT = Path(__file__).parent.parent


def test_config_reference_is_current() -> None:
    path = ROOT / "tools" / "config_reference.py"
    spec = importlib.util.spec_from_file_location("config_reference", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "configs.md").read_text(encoding="utf-8") == module.reference(), (
        "docs/configs.md is out of date: run `make docs`"
    )


def test_the_first_example_runs_as_it_stands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    small = (tiny_model("llama"), tiny_tokenizer())
    monkeypatch.setattr("vqkv.models.load_model", lambda name: small)
    exec(example, {})
    assert "'total': " in capsys.readouterr().out


def test_links_in_documents_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("examples/*/*.md")]
    assert pages
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
