"""The search: candidates within the budget, costs that tell KL, nothing done twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_text, tiny_tokenizer
from tests.tiny_models import tiny_model
from vqkv.calibration import calibration_windows, capture, read_text
from vqkv.calibration.source import CapturedStates
from vqkv.calibration.spool import Spool
from vqkv.calibration.spooling import wanted_kinds
from vqkv.cli import app
from vqkv.compressor import KVCompressor
from vqkv.errors import SchemeError, TextError
from vqkv.evaluation import compare as comparing
from vqkv.evaluation.canary import Canary
from vqkv.evaluation.compare import Settings
from vqkv.geometry import Geometry
from vqkv.scheme_files import load_scheme
from vqkv.tuning import run
from vqkv.tuning.costs import stream_costs
from vqkv.tuning.rates import eighths, ladder
from vqkv.tuning.run import Template, best, tune

SMALL = Template("recommended-2bit", eighths(0.25, 3))


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(run.TEMPLATES, "recommended", SMALL)


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    made = [tmp_path / f"{name}.txt" for name in ("a", "b")]
    for seed, path in enumerate(made):
        path.write_text(tiny_text(1200, seed=seed))
    return made


def settings(texts: list[Path]) -> Settings:
    return Settings(
        calibration_texts=(texts[0],), calibration_tokens=256, tokens=128, skip=0, context=64,
        passages=0,
    )  # fmt: skip


def model(**overrides: Any) -> Any:
    return tiny_model("llama", num_hidden_layers=4, **overrides)


def test_candidates_hold_the_budget_and_the_best_has_the_lowest_kl(texts: list[Path]) -> None:
    found = list(tune(model(), tiny_tokenizer(), [texts[1]], 1.5, settings(texts)))
    names = [candidate.scheme.name for candidate in found]
    assert names[:3] == ["recommended-1", "recommended-1.5", "recommended-2"]
    assert names[3] == "recommended-1.5-round1"
    assert all(c.bits <= 1.5 for c in found if c.scheme.name.startswith("recommended-1.5"))
    assert all(c.kl > 0 and c.expected > 0 for c in found)
    within = [candidate for candidate in found if candidate.bits <= 1.5]
    assert best(found, 1.5, "kl").kl == min(candidate.kl for candidate in within)
    # Tiny models that have seen so little are no measure of KL; what errors cost is one of rates.
    assert found[0].expected > found[2].expected


def test_what_was_found_is_not_looked_for_again(
    texts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: Any = (model(), tiny_tokenizer(), [texts[1]], 1.5, settings(texts))
    first = list(tune(*arguments))

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("done already")

    for name in ("calibrate", "capture", "evaluate"):
        monkeypatch.setattr(comparing, name, refuse)
    assert list(tune(*arguments)) == first


def test_a_budget_below_all_rates_is_refused(texts: list[Path]) -> None:
    with pytest.raises(SchemeError, match=r"lowest rate of family 'recommended' is 0\.5"):
        list(tune(model(), tiny_tokenizer(), [texts[1]], 0.25, settings(texts)))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("kind", ["recommended", "fast"])
def test_models_of_few_layers_and_with_sliding_ones_are_tuned(
    kind: Any, family: str, texts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = Template("fast-2bit", ladder((2, 4, 8), (4,)), anchors=(0.5, 1.0, 2.0))
    monkeypatch.setitem(run.TEMPLATES, "fast", fast)
    network = tiny_model(family)
    found = list(tune(network, tiny_tokenizer(), [texts[1]], 1.5, settings(texts), kind, "ratio"))
    assert best(found, 1.5, "ratio").bits <= 1.5


def test_only_the_best_is_distilled(texts: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Canary, "ok", property(lambda canary: True))
    fast = Template("fast-2bit", ladder((2, 4, 8), (4,)), anchors=(0.5, 1.0, 2.0))
    monkeypatch.setitem(run.TEMPLATES, "fast", fast)
    network, given = tiny_model("llama"), settings(texts)
    *compared, last = tune(network, tiny_tokenizer(), [texts[1]], 1.5, given, "fast")
    assert {candidate.scheme.calibration.distillation for candidate in compared} == {None}
    preset = load_scheme("fast-2bit")
    assert last.scheme.calibration == preset.calibration
    chosen = best(compared, 1.5, "kl").scheme
    assert last.scheme.name == f"{chosen.name}-distilled"
    assert (last.scheme.keys, last.scheme.layers) == (chosen.keys, chosen.layers)


def test_the_objective_says_which_one_is_distilled(
    texts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = Template("fast-2bit", ladder((2, 4, 8), (4,)), anchors=(0.5, 1.0, 2.0))
    monkeypatch.setitem(run.TEMPLATES, "fast", fast)
    monkeypatch.setattr(Canary, "ok", property(lambda canary: True))
    asked: list[str] = []

    def by(candidates: Any, bits: float, objective: Any) -> Any:
        asked.append(objective)
        return candidates[0]

    monkeypatch.setattr(run, "best", by)
    network, given = tiny_model("llama"), settings(texts)
    found = list(tune(network, tiny_tokenizer(), [texts[1]], 1.5, given, "fast", "ratio"))
    assert asked == ["ratio"]
    assert found[-1].scheme.name == f"{found[0].scheme.name}-distilled"


def test_heads_that_no_group_divides_are_refused(texts: list[Path]) -> None:
    odd = model(head_dim=18)
    with pytest.raises(SchemeError, match="no step of it fills whole bytes of heads of 18"):
        list(tune(odd, tiny_tokenizer(), [texts[1]], 1.5, settings(texts)))


def test_a_short_text_is_refused_before_anything_is_learned(
    texts: list[Path], tmp_path: Path
) -> None:
    texts[1].write_text(tiny_text(20))
    with pytest.raises(TextError, match="has 20 tokens"):
        list(tune(model(), tiny_tokenizer(), [texts[1]], 1.5, settings(texts)))
    assert not list((tmp_path / "cache").rglob("states-*"))


def test_costs_are_half_the_information_of_errors(texts: list[Path], tmp_path: Path) -> None:
    model = tiny_model("llama")
    compressor = KVCompressor(load_scheme("fast-2bit"), Geometry.from_model(model))
    windows = calibration_windows(tiny_tokenizer(), [read_text(texts[0])], 512, 64)
    spool = Spool(tmp_path / "states", 4)
    capture(model, wanted_kinds(compressor), windows, spool)
    source = CapturedStates(spool, model, compressor, 64)
    compressor.fit(source)
    costs = stream_costs(compressor, source)
    layer = compressor.geometry.compressed[-1]
    states = torch.cat(list(source.states(layer, "keys").chunks()))
    codec = compressor.codec(layer, "keys")
    error = (codec.decode(codec.encode(states)) - states).double()
    gradients = torch.cat(list(source.gradients(layer, "keys").chunks())).double()
    # The mean of (g · e)² over all pairs of a gradient and an error, head by head.
    pairs = torch.einsum("nhd,mhd->hnm", gradients, error).square()
    expected = pairs.mean((1, 2)).sum() / 2
    assert costs[layer, "keys"] == pytest.approx(float(expected))
    assert costs.keys() == dict(compressor.codecs()).keys()


@pytest.mark.parametrize("sees", [True, False])
def test_the_command_writes_a_scheme_unless_a_canary_fails(
    sees: bool, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Canary, "ok", property(lambda canary: sees))
    checkpoint, out = save_tiny_checkpoint(tmp_path / "model"), tmp_path / "found.yaml"
    model().save_pretrained(checkpoint)
    command = [
        *("tune", str(checkpoint), "--bits", "1.5", "--text", str(texts[1]), "--out", str(out)),
        *("--calibrate-on", str(texts[0]), "--calibration-tokens", "256", "--tokens", "128"),
        *("--context", "64", "--json"),
    ]
    ran = CliRunner().invoke(app, command)
    if not sees:
        assert ran.exit_code == 3 and "the canary failed" in ran.stderr and not out.exists()
        return
    assert ran.exit_code == 0, ran.output
    printed = json.loads(ran.stdout)
    scheme = load_scheme(out)
    assert scheme.name == printed["chosen"]
    frontier = {each["scheme"]["name"]: each for each in printed["frontier"]}
    assert scheme.to_dict() == frontier[scheme.name]["scheme"]
    assert "Found by `vqkv tune`" in out.read_text()
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 2 and "exists already" in again.stderr
