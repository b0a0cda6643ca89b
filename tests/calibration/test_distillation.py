"""Distillation: gradients by codewords, steps that bring predictions nearer, and interruptions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import PreTrainedModel

from tests.calibration.stubs import StubTokenizer, scheme, write_text
from tests.calibration.test_run import Interrupted, Tensors, assert_same, left, tensors
from tests.tiny_models import tiny_model
from vqkv import attach
from vqkv.cache import BeforeUseCache
from vqkv.calibration import (
    CalibrationReport,
    calibrate,
    calibration_windows,
    read_text,
)
from vqkv.calibration.distillation import Distillation, divergence
from vqkv.compressor import KVCompressor
from vqkv.errors import SchemeError, StateError
from vqkv.quantizers.residual import ResidualConfig, ResidualQuantizer
from vqkv.scheme import Scheme
from vqkv.scheme_files import scheme_from_dict


def distilled(passes: int = 3, step: float = 0.1, **changes: Any) -> Scheme:
    data = scheme().to_dict()
    data["calibration"]["distillation"] = {"passes": passes, "step": step}
    return scheme_from_dict({**data, **changes})


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt", 400)


@pytest.fixture
def run(model: PreTrainedModel, text: Path, tmp_path: Path) -> Callable[..., CalibrationReport]:
    """Calibrates the tiny model in 4 windows of 48 tokens."""
    text = write_text(tmp_path / "text.txt", 400)

    tokenizer: Any = StubTokenizer()

    def run(given: Scheme, **changes: Any) -> CalibrationReport:
        settings = {"model": model, "texts": [text], "out": tmp_path / "out", **changes}
        return calibrate(tokenizer=tokenizer, scheme=given, tokens=192, context=48, **settings)

    return run


def windows_of(text: Path) -> list[torch.Tensor]:
    tokenizer: Any = StubTokenizer()
    return calibration_windows(tokenizer, [read_text(text)], 192, 48)


def mean_kl(model: PreTrainedModel, compressor: KVCompressor, text: Path) -> float:
    found = []
    with torch.no_grad(), attach(model, compressor):
        for window in windows_of(text):
            cache = BeforeUseCache(compressor, model.config)
            logits = model(window[None], past_key_values=cache).logits[0]
            found.append(divergence(model(window[None]).logits[0], logits)[0])
    return sum(found) / len(found)


# --- gradients ---------------------------------------------------------------------------------


@given(seed=st.integers(0, 99), stages=st.integers(1, 3))
def test_a_codewords_gradient_is_that_of_the_vectors_it_is_part_of(seed: int, stages: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    books = torch.randn(2, stages, 4, 3, generator=generator).requires_grad_()
    codes = torch.randint(4, (9, 2, stages), generator=generator)
    weight = torch.randn(9, 2, 3, generator=generator)
    subspace, stage = torch.arange(2)[:, None], torch.arange(stages)
    (books[subspace, stage, codes].sum(2) * weight).sum().backward()
    quantizer = ResidualQuantizer(ResidualConfig(depth=stages, code_bits=2))
    quantizer.keep(books.detach())
    assert books.grad is not None
    torch.testing.assert_close(quantizer.gradient(codes.int(), weight), books.grad)


def test_the_divergence_and_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    exact, logits = (torch.randn(70, 11, generator=generator) for _ in range(2))
    logits.requires_grad_()
    p, q = torch.log_softmax(exact, -1), torch.log_softmax(logits, -1)
    expected = torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
    expected.backward()
    found, gradient = divergence(exact.clone(), logits.detach())
    assert found == pytest.approx(float(expected.detach()), rel=1e-5)
    assert logits.grad is not None
    torch.testing.assert_close(gradient, 70 * logits.grad)


# --- what comes of it --------------------------------------------------------------------------


@pytest.mark.parametrize("rope", ["pre", "post"])
def test_predictions_come_nearer_to_the_exact_models(
    run: Callable[..., CalibrationReport], model: PreTrainedModel, text: Path, rope: str
) -> None:
    keys = scheme(rope).to_dict()["keys"]
    before = run(scheme(rope)).compressor
    after = run(distilled(keys=keys), overwrite=True).compressor
    assert mean_kl(model, after, text) < 0.9 * mean_kl(model, before, text)


def test_only_codewords_move(run: Callable[..., CalibrationReport]) -> None:
    before = tensors(run(scheme()).compressor)
    after = tensors(run(distilled(), overwrite=True).compressor)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == {name for name in after if name.endswith("codewords")}


def test_the_model_stays_as_it_is(
    run: Callable[..., CalibrationReport], model: PreTrainedModel
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    needed = [weight.requires_grad for weight in model.parameters()]
    model.train()
    run(distilled())
    assert model.training
    model.eval()
    assert_same(model.state_dict(), before)
    assert [weight.requires_grad for weight in model.parameters()] == needed
    assert all(weight.grad is None for weight in model.parameters())


def test_codebooks_that_the_model_shares_move_as_one(
    run: Callable[..., CalibrationReport], tmp_path: Path
) -> None:
    data = distilled().to_dict()
    data["values"]["sharing"] = "model"
    compressor = run(scheme_from_dict(data)).compressor
    first, last = (compressor.codec(layer, "values").quantizers[0] for layer in (0, 1))
    assert first is last
    plain = scheme_from_dict({**data, "calibration": scheme().to_dict()["calibration"]})
    before = tensors(run(plain, out=tmp_path / "plain").compressor)
    moved = tensors(compressor)["0.values.segments.0.codewords"]
    assert not torch.equal(moved, before["0.values.segments.0.codewords"])
    loaded = KVCompressor.from_pretrained(tmp_path / "out")
    assert_same(tensors(loaded), tensors(compressor))


def test_streams_that_are_predicted_from_others(
    run: Callable[..., CalibrationReport], model: PreTrainedModel, text: Path
) -> None:
    data = distilled(step=0.02).to_dict()
    data["values"]["predictor"] = {
        "type": "linear",
        "sources": [{"stream": "keys", "back": 0}],
    }
    after = run(scheme_from_dict(data)).compressor
    plain = scheme_from_dict({**data, "calibration": scheme().to_dict()["calibration"]})
    before = run(plain, overwrite=True).compressor
    assert mean_kl(model, after, text) < mean_kl(model, before, text)


def test_residual_codes_of_a_bf16_model(run: Callable[..., CalibrationReport], text: Path) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    values = scheme().to_dict()["values"]
    values["quantizer"] = {"type": "residual", "depth": 2, "code_bits": 2}
    before = run(scheme(values=values), model=model).compressor
    after = run(distilled(values=values), model=model, overwrite=True).compressor
    assert mean_kl(model, after, text) < mean_kl(model, before, text)


def test_codes_chosen_together(
    run: Callable[..., CalibrationReport], model: PreTrainedModel, text: Path
) -> None:
    quantizer = scheme().to_dict()["values"]["quantizer"]
    bits = quantizer["code_bits"]
    streams: dict[str, Any] = {
        "keys": {
            "rope": "pre",
            "transforms": [
                {"type": "pair_metric", "metric": "fisher", "dim": 4, "code_bits": bits}
            ],
            "grouping": {"type": "contiguous", "dim": 4},
            "quantizer": {**quantizer, "type": "joint_product"},
        },
        "values": {
            "transforms": [{"type": "spectral", "metric": "fisher"}],
            "grouping": {"type": "contiguous", "dim": 4},
            "quantizer": {**quantizer, "type": "joint_heads"},
        },
    }
    before = run(scheme(**streams)).compressor
    after = run(distilled(**streams), overwrite=True).compressor
    assert mean_kl(model, after, text) < mean_kl(model, before, text)


def test_streams_without_codewords_stay_as_they_are(
    run: Callable[..., CalibrationReport], model: PreTrainedModel, text: Path
) -> None:
    """Beside a data-free stream of one layer, and trellises over runs of tokens."""
    data = scheme().to_dict()
    data["keys"]["quantizer"] = {"type": "trellis", "rate": 2}
    data["keys"]["grouping"] = {"type": "whole"}
    exact = {"quantizer": {"type": "identity"}}
    changed = {"keys": data["keys"], "layers": [{"layers": [0], "values": exact}]}
    before = tensors(run(scheme(**changed)).compressor)
    after = tensors(run(distilled(**changed), overwrite=True).compressor)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == {"1.values.segments.0.codewords"}


def test_progress(run: Callable[..., CalibrationReport]) -> None:
    told: list[tuple[str, int, int]] = []
    run(distilled(passes=2), progress=lambda *report: told.append(report))
    assert told[-9:] == [("distil", done, 8) for done in range(9)]


# --- interruptions -----------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, 7])
def test_an_interrupted_distillation_goes_on(
    run: Callable[..., CalibrationReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:
    uninterrupted: Tensors = tensors(run(distilled(), out=tmp_path / "uninterrupted").compressor)
    original = Distillation._step
    steps: list[int] = []

    def step(teacher: Distillation, ids: torch.Tensor) -> None:
        if len(teacher.losses) == after:
            raise Interrupted
        original(teacher, ids)

    with monkeypatch.context() as patch:
        patch.setattr(Distillation, "_step", step)
        with pytest.raises(Interrupted):
            run(distilled())
    assert left(tmp_path) == {"uninterrupted", "out.partial"}

    def counted(teacher: Distillation, ids: torch.Tensor) -> None:
        steps.append(len(teacher.losses))
        original(teacher, ids)

    with monkeypatch.context() as patch:
        patch.setattr(Distillation, "_step", counted)
        report = run(distilled())
    assert steps == list(range(after, 12))
    assert left(tmp_path) == {"uninterrupted", "out"}
    assert_same(tensors(report.compressor), uninterrupted)


def test_a_damaged_checkpoint_starts_it_anew(
    run: Callable[..., CalibrationReport],
    text: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    steps = tmp_path / "steps.safetensors"
    steps.write_bytes(b"rubbish")
    compressor = run(scheme()).compressor
    compressor.scheme = distilled(passes=1)
    windows = windows_of(text)
    teacher = Distillation(tiny_model("llama"), compressor, windows, steps, seed=0)
    teacher.run()
    assert len(teacher.losses) == 4
    assert "damaged, so distilled anew" in caplog.text


# --- refusals ----------------------------------------------------------------------------------


def test_there_must_be_codewords_that_are_learned() -> None:
    fixed = {
        "type": "product",
        "code_bits": 2,
        "learner": {"type": "uniform", "low": -1, "high": 1},
    }
    stream = {
        "transforms": [{"type": "token_scale"}],
        "grouping": {"type": "contiguous", "dim": 1},
        "quantizer": fixed,
    }
    with pytest.raises(
        ValidationError, match=r"distillation: moves learned codewords, .* given product"
    ):
        Scheme.model_validate(
            {
                "name": "grid",
                "keys": {"rope": "post", **stream},
                "values": stream,
                "calibration": {"distillation": {}},
            }
        )


def test_a_model_without_codewords_to_distil(run: Callable[..., CalibrationReport]) -> None:
    """They are all of layers that an override gives something else."""
    exact = {"quantizer": {"type": "identity"}}
    layers = [{"layers": [0, 1], "keys": exact, "values": exact}]
    with pytest.raises(SchemeError, match=r"tiny: calibration\.distillation: .* given identity"):
        run(distilled(layers=layers))


def test_steps_that_lead_nowhere(run: Callable[..., CalibrationReport], tmp_path: Path) -> None:
    """A model whose gradients are not finite, though its predictions are."""
    model: Any = tiny_model("llama")
    broken = model.model.layers[1].register_forward_hook(
        lambda module, args, out: out + 0 * torch.sqrt(out - out)
    )
    with pytest.raises(StateError, match="after 0 steps predictions or gradients are not finite"):
        run(distilled(), model=model)
    broken.remove()
    assert left(tmp_path) == set()
