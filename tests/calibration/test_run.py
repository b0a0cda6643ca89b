from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel

from tests.calibration.stubs import StubTokenizer, scheme, write_text
from tests.tiny_models import tiny_model
from vqkv import artefact
from vqkv.calibration import CalibrationReport, Spool, StateCapture, calibrate
from vqkv.codebooks import assignment
from vqkv.codec import Codec
from vqkv.compressor import KVCompressor
from vqkv.errors import ArtefactError, KernelError, ModelError, StateError, TextError
from vqkv.scheme import Scheme
from vqkv.scheme_files import load_scheme, scheme_from_dict
from vqkv.states import States

Tensors = dict[str, torch.Tensor]


class Interrupted(BaseException):
    """As a signal would: nothing that catches Exception sees it."""


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    return [write_text(tmp_path / f"text-{i}.txt", 400, seed=i) for i in range(2)]


@pytest.fixture
def run(model: PreTrainedModel, texts: list[Path], tmp_path: Path) -> Callable[..., Any]:
    """Calibrates the tiny model in 8 windows of 48 tokens."""

    def run(**changes: Any) -> CalibrationReport:
        given = {
            "model": model,
            "tokenizer": StubTokenizer(),
            "scheme": scheme(),
            "texts": texts,
            "tokens": 360,
            "context": 48,
            "out": tmp_path / "out",
            **changes,
        }
        return calibrate(**given)

    return run


@pytest.fixture
def uninterrupted(run: Callable[..., Any], tmp_path: Path) -> Tensors:
    return tensors(run(out=tmp_path / "uninterrupted").compressor)


def tensors(compressor: KVCompressor) -> Tensors:
    return {f"{stream}.{name}": tensor for stream, name, tensor in compressor.tensors()}


def assert_same(given: Tensors, expected: Tensors) -> None:
    assert set(given) == set(expected)
    for name, tensor in given.items():
        assert torch.equal(tensor, expected[name]), name


def left(folder: Path) -> set[str]:
    """What lies in a folder beside the texts."""
    return {path.name for path in folder.iterdir() if path.suffix != ".txt"}


# --- the result --------------------------------------------------------------------------------


def test_the_artefact_is_what_was_fitted(run: Callable[..., Any], tmp_path: Path) -> None:
    report = run()
    assert left(tmp_path) == {"out"}
    loaded = KVCompressor.from_pretrained(tmp_path / "out")
    assert_same(tensors(loaded), tensors(report.compressor))
    assert loaded.scheme == scheme()


def test_it_says_where_it_comes_from(
    run: Callable[..., Any], model: PreTrainedModel, texts: list[Path], tmp_path: Path
) -> None:
    run(seed=3)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    hashes = stored["calibration"].pop("text_sha256")
    assert [len(digest) for digest in hashes] == [64, 64] and hashes[0] != hashes[1]
    assert stored["calibration"] == {
        "tokens": 360,
        "context": 48,
        "seed": 3,
        "texts": ["text-0.txt", "text-1.txt"],
    }


def test_the_model_is_named_without_the_folders_of_this_machine(
    run: Callable[..., Any], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    folder = tmp_path / "my-model"
    tiny_model("llama").save_pretrained(folder)
    model = type(tiny_model("llama")).from_pretrained(folder)
    run(model=model)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored["base_model"] == "my-model"
    recwarn.clear()
    KVCompressor.from_pretrained(tmp_path / "out", model.config)
    assert not recwarn.list


def test_it_learns_from_the_models_states_without_the_sinks(
    run: Callable[..., Any], model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, int] = {}

    def fit_space(codec: Codec, states: States, *metrics: torch.Tensor | None) -> None:
        seen[codec.where] = states.tokens
        original(codec, states, *metrics)

    original = Codec.fit_space
    monkeypatch.setattr(Codec, "fit_space", fit_space)
    run(scheme=scheme(sinks=5))
    assert len(seen) == 4
    # Per text 180 tokens in windows of 48, 48, 48 and 36.
    assert set(seen.values()) == {2 * (3 * 43 + 31)}


def test_pre_and_post_rope_keys_can_be_mixed(run: Callable[..., Any], tmp_path: Path) -> None:
    pre = tensors(run(scheme=scheme("pre"), out=tmp_path / "pre").compressor)
    post = tensors(run(scheme=scheme("post"), out=tmp_path / "post").compressor)
    mixed = scheme("pre", layers=[{"layers": [1], "keys": {"rope": "post"}}])
    found = tensors(run(scheme=mixed).compressor)
    assert not torch.equal(
        pre["1.keys.transforms.0.channels"], post["1.keys.transforms.0.channels"]
    )
    assert_same(found, {n: (post if n.startswith("1.keys") else pre)[n] for n in pre})


def test_only_full_attention_layers_are_calibrated(run: Callable[..., Any]) -> None:
    report = run(model=tiny_model("gemma3"))
    assert {name.split(".")[0] for name in tensors(report.compressor)} == {"1"}


def test_a_bf16_model(run: Callable[..., Any]) -> None:
    report = run(model=tiny_model("llama", dtype=torch.bfloat16))
    assert report.compressor.fitted


def test_codebooks_shared_by_the_model(run: Callable[..., Any], tmp_path: Path) -> None:
    shared = scheme()
    data = shared.to_dict()
    data["values"]["sharing"] = "model"
    report = run(scheme=scheme_from_dict(data))
    loaded = KVCompressor.from_pretrained(tmp_path / "out")
    assert_same(tensors(loaded), tensors(report.compressor))


def test_the_report(run: Callable[..., Any]) -> None:
    report = run()
    found = report.to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["bits_per_value"] == report.compressor.bits_per_value
    assert found["side_bytes"] == sum(t.nbytes for t in tensors(report.compressor).values())
    assert found["health"]["codebooks"] == 4
    assert found["seconds_capture"] > 0 and found["seconds_learn"] > 0
    assert found["peak_rss_bytes"] > 50 << 20


def test_progress_runs_through_both_phases(run: Callable[..., Any]) -> None:
    told: list[tuple[str, int, int]] = []
    run(progress=lambda *report: told.append(report))
    captured = [0, 48, 96, 144, 180, 228, 276, 324, 360]
    assert told == [("capture", done, 360) for done in captured] + [
        ("learn", done, 4) for done in range(5)
    ]


def test_a_data_free_scheme_is_saved_at_once(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StateCapture, "run", lambda *_: pytest.fail("the model ran"))
    data_free = load_scheme("scalar-2bit")
    assert data_free.data_free
    report = run(scheme=data_free)
    assert (report.seconds_capture, report.seconds_learn) == (0, 0)
    assert left(tmp_path) == {"out"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["calibration"] == {}


def test_only_what_learns_is_captured(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = scheme().to_dict()
    data["keys"] = {**data["keys"], "transforms": [], "quantizer": {"type": "identity"}}
    seen: set[tuple[int, str]] = set()
    original = Spool.append

    def append(spool: Spool, layer: int, stream: Any, x: torch.Tensor) -> None:
        seen.add((layer, stream))
        original(spool, layer, stream, x)

    monkeypatch.setattr(Spool, "append", append)
    told: list[tuple[str, int, int]] = []
    run(scheme=scheme_from_dict(data), progress=lambda *report: told.append(report))
    assert seen == {(0, "values"), (1, "values")}
    assert told[-3:] == [("learn", 0, 2), ("learn", 1, 2), ("learn", 2, 2)]


# --- refusals ----------------------------------------------------------------------------------


def test_an_existing_folder_is_refused_before_any_work(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    run()
    with pytest.raises(ArtefactError, match="out exists already: choose another folder"):
        run(texts=[tmp_path / "not even read"])
    assert left(tmp_path) == {"out"}


def test_an_artefact_is_overwritten_on_purpose(run: Callable[..., Any], tmp_path: Path) -> None:
    run()
    report = run(seed=1, overwrite=True)
    assert left(tmp_path) == {"out"}
    assert_same(tensors(KVCompressor.from_pretrained(tmp_path / "out")), tensors(report.compressor))


def test_a_damaged_artefact_can_be_overwritten(run: Callable[..., Any], tmp_path: Path) -> None:
    run()
    (tmp_path / "out" / "config.json").write_text("{")
    run(overwrite=True)
    KVCompressor.from_pretrained(tmp_path / "out")


def test_nobodys_own_files_are_overwritten(run: Callable[..., Any], tmp_path: Path) -> None:
    thesis = tmp_path / "out" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    with pytest.raises(ArtefactError, match=r"out holds more than .* \(thesis\.tex\)"):
        run(overwrite=True)
    assert thesis.read_text() == "years of work"


def test_nobodys_own_files_are_taken_for_work_in_progress(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    thesis = tmp_path / "out.partial" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    with pytest.raises(ArtefactError, match=r"it holds thesis\.tex: move it away"):
        run()
    assert thesis.read_text() == "years of work"


def test_another_calibration_is_writing(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    with (
        FileLock(tmp_path / "out.partial" / "lock"),
        pytest.raises(ArtefactError, match="another calibration is writing there"),
    ):
        run()
    run()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"texts": []}, TextError, "at least one text"),
        ({"tokens": 5000}, TextError, r"'text-0\.txt' has 400 tokens, needed are 2500"),
        ({"context": 257}, ModelError, "windows of 257 tokens .* the model's 256 positions"),
    ],
    ids=["no texts", "short text", "long context"],
)
def test_what_cannot_be_calibrated_leaves_nothing(
    run: Callable[..., Any],
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        run(**changes)
    assert left(tmp_path) == set()


def test_an_empty_text(run: Callable[..., Any], texts: list[Path], tmp_path: Path) -> None:
    texts[1].write_text("")
    with pytest.raises(TextError, match=r"text-1\.txt' is empty"):
        run()
    assert left(tmp_path) == set()


def test_a_model_without_full_attention(run: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match="mistral: no layer has full attention"):
        run(model=tiny_model("mistral"))


def test_states_that_are_not_finite(run: Callable[..., Any], tmp_path: Path) -> None:
    model: Any = tiny_model("llama")
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(
        StateError, match=r"values of layer 1 in window 0 .*hold nan at \[0, 0, 0\]"
    ):
        run(model=model)
    assert left(tmp_path) == set()


def test_fewer_tokens_than_codewords(run: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"keys of layer 0: 8 codewords need .* given 6"):
        run(tokens=10)
    assert left(tmp_path) == set()


def learner_scheme(**learner: Any) -> Scheme:
    data = scheme().to_dict()
    data["values"]["quantizer"]["learner"] = {"type": "kmeans", **learner}
    return scheme_from_dict(data)


def without_faiss(name: str) -> Any:
    raise ImportError(f"no {name}")


def test_a_learner_that_cannot_run_is_refused_before_the_model_runs(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StateCapture, "run", lambda *_: pytest.fail("the model ran"))
    monkeypatch.setattr(assignment, "importlib", SimpleNamespace(import_module=without_faiss))
    nested = {"type": "residual", "stages": 1, "learner": {"type": "kmeans", "backend": "faiss"}}
    for given in (learner_scheme(backend="faiss"), learner_scheme(**nested)):
        with pytest.raises(KernelError, match=r"'faiss' needs faiss, .* pip install 'vqkv\[cpu\]'"):
            run(scheme=given)
    assert left(tmp_path) == set()


# --- interruptions -----------------------------------------------------------------------------


def interrupt_capture(monkeypatch: pytest.MonkeyPatch, after: int) -> list[int]:
    """Fail in the middle of a window; the list fills with the windows that ran."""
    ran: list[int] = []
    original = Spool.append

    def append(spool: Spool, layer: int, stream: Any, x: torch.Tensor) -> None:
        if spool.windows == after and layer == 1:
            raise Interrupted
        if layer == 0 and stream == "pre_keys":
            ran.append(spool.windows)
        original(spool, layer, stream, x)

    monkeypatch.setattr(Spool, "append", append)
    return ran


def interrupt_learning(monkeypatch: pytest.MonkeyPatch, at: str | None) -> list[str]:
    fitted: list[str] = []
    original = Codec.fit_space

    def fit_space(codec: Codec, states: States, *metrics: torch.Tensor | None) -> None:
        if codec.where == at:
            raise Interrupted
        fitted.append(codec.where)
        original(codec, states, *metrics)

    monkeypatch.setattr(Codec, "fit_space", fit_space)
    return fitted


@pytest.mark.parametrize("after", [0, 3])
def test_an_interrupted_capture_goes_on(
    run: Callable[..., Any],
    uninterrupted: Tensors,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:
    with monkeypatch.context() as patch:
        interrupt_capture(patch, after)
        with pytest.raises(Interrupted):
            run()
    assert left(tmp_path) == {"uninterrupted", "out.partial"}
    with monkeypatch.context() as patch:
        ran = interrupt_capture(patch, -1)
        report = run()
    assert ran == list(range(after, 8))
    assert left(tmp_path) == {"uninterrupted", "out"}
    assert_same(tensors(report.compressor), uninterrupted)
    assert_same(tensors(KVCompressor.from_pretrained(tmp_path / "out")), uninterrupted)


def test_interrupted_learning_goes_on(
    run: Callable[..., Any],
    uninterrupted: Tensors,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        interrupt_learning(patch, "keys of layer 1")
        with pytest.raises(Interrupted):
            run()
    with monkeypatch.context() as patch:
        patch.setattr(StateCapture, "run", lambda *_: pytest.fail("the model ran again"))
        fitted = interrupt_learning(patch, None)
        report = run()
    assert fitted == ["keys of layer 1", "values of layer 1"]
    assert_same(tensors(report.compressor), uninterrupted)
    stored = [json.loads((tmp_path / n / "config.json").read_text()) for n in left(tmp_path)]
    assert stored[0]["health"] == stored[1]["health"]


def test_an_interrupt_leaves_the_old_artefact(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tensors(run().compressor)
    with monkeypatch.context() as patch:
        interrupt_learning(patch, "values of layer 1")
        with pytest.raises(Interrupted):
            run(seed=1, overwrite=True)
    assert_same(tensors(KVCompressor.from_pretrained(tmp_path / "out")), before)


@pytest.mark.parametrize("error", [KernelError("no faiss"), ArtefactError("in the way")])
def test_what_can_be_mended_leaves_the_work(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Codec, "fit_quantizers", fail)
        with pytest.raises(type(error)):
            run()
    assert left(tmp_path) == {"out.partial"}
    monkeypatch.setattr(StateCapture, "run", lambda *_: pytest.fail("the model ran again"))
    run()
    assert left(tmp_path) == {"out"}


def test_an_artefact_that_appears_meanwhile_costs_no_work(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = run(out=tmp_path / "other").folder

    def arrives(phase: str, done: int, total: int) -> None:
        if (phase, done) == ("learn", 2):
            shutil.copytree(other, tmp_path / "out")

    with pytest.raises(ArtefactError, match="out exists already"):
        run(progress=arrives)
    assert left(tmp_path) == {"other", "out", "out.partial"}
    fitted = interrupt_learning(monkeypatch, None)
    run(overwrite=True)
    assert fitted == []


def whole_but_odd(path: Path) -> None:
    save_file({"x": torch.zeros(1)}, path, {"health": "[{}]"})


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(b"half"), whole_but_odd])
def test_a_damaged_fitted_stream_is_fitted_anew(
    run: Callable[..., Any],
    uninterrupted: Tensors,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[Path], Any],
) -> None:
    with monkeypatch.context() as patch:
        interrupt_learning(patch, "values of layer 1")
        with pytest.raises(Interrupted):
            run()
    spoil(tmp_path / "out.partial" / "fitted" / "0.values.safetensors")
    with monkeypatch.context() as patch:
        fitted = interrupt_learning(patch, None)
        report = run()
    assert fitted == ["values of layer 0", "values of layer 1"]
    assert "0.values.safetensors: damaged, so fitted anew" in caplog.text
    assert_same(tensors(report.compressor), uninterrupted)


def other_scheme() -> Scheme:
    return scheme(sinks=3)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"tokens": 364}, "tokens"),
        ({"context": 40}, "context"),
        ({"scheme": other_scheme()}, "fingerprint"),
        ({"model": tiny_model("qwen2")}, "geometry"),
    ],
    ids=["seed", "tokens", "context", "scheme", "model"],
)
def test_anything_else_starts_anew(
    run: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, Any],
    named: str,
) -> None:
    with monkeypatch.context() as patch:
        interrupt_learning(patch, "values of layer 1")
        with pytest.raises(Interrupted):
            run()
    expected = tensors(run(out=tmp_path / "fresh", **changes).compressor)
    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        fitted = interrupt_learning(patch, None)
        report = run(**changes)
    assert len(fitted) == 4
    (line,) = [r.getMessage() for r in caplog.records if "starting anew" in r.getMessage()]
    assert named in line.split("starting anew")[1]
    assert_same(tensors(report.compressor), expected)


def test_changed_weights_or_text_start_anew(
    run: Callable[..., Any],
    texts: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def interrupted(**changes: Any) -> None:
        with monkeypatch.context() as patch:
            interrupt_learning(patch, "values of layer 1")
            with pytest.raises(Interrupted):
                run(**changes)

    model: Any = tiny_model("llama")
    interrupted(model=model)
    model.model.layers[0].self_attn.k_proj.weight.data *= 2
    interrupted(model=model)
    write_text(texts[0], 400, seed=9)
    interrupted(model=model)
    lines = [r.getMessage().split("starting anew, ")[1] for r in caplog.records]
    assert lines == ["model_sample differ", "text_sha256, window_sha256 differ"]


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:10])


@pytest.mark.parametrize("file", ["manifest.json", "states/index.json", "states/0.pre_keys.raw"])
def test_a_damaged_work_in_progress_starts_anew(
    run: Callable[..., Any],
    uninterrupted: Tensors,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    file: str,
) -> None:
    with monkeypatch.context() as patch:
        interrupt_learning(patch, "values of layer 1")
        with pytest.raises(Interrupted):
            run()
    damage(tmp_path / "out.partial" / file)
    report = run()
    assert "starting anew" in caplog.text
    assert_same(tensors(report.compressor), uninterrupted)


@pytest.mark.parametrize(
    "full", [OSError(28, "No space left on device"), SafetensorError("IoError(StorageFull)")]
)
def test_a_full_disk_while_saving_leaves_nothing_at_out(
    run: Callable[..., Any],
    uninterrupted: Tensors,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    full: Exception,
) -> None:
    def save_half(tensors: Tensors, path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(artefact, "save_file", save_half)
        with pytest.raises(ArtefactError, match="make room and calibrate again"):
            run()
    assert left(tmp_path) == {"uninterrupted", "out.partial"}
    with monkeypatch.context() as patch:
        fitted = interrupt_learning(patch, None)
        report = run()
    assert fitted == []
    assert_same(tensors(report.compressor), uninterrupted)


def calibrate_until_killed(texts: list[Path], out: Path, phase: str, done: int) -> None:
    def kill(now: str, count: int, total: int) -> None:
        if now == phase and count >= done:
            os.kill(os.getpid(), signal.SIGKILL)

    tokenizer: Any = StubTokenizer()
    torch.set_num_threads(1)
    calibrate(
        tiny_model("llama"),
        tokenizer,
        scheme(),
        texts,
        tokens=360,
        context=48,
        out=out,
        progress=kill,
    )


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_killed_twice_and_the_same_in_the_end(
    texts: list[Path],
    run: Callable[..., Any],
    tmp_path: Path,
) -> None:
    expected = tensors(run(out=tmp_path / "uninterrupted").compressor)
    context = multiprocessing.get_context("spawn")
    for phase, done in (("capture", 144), ("learn", 2)):
        args = (texts, tmp_path / "out", phase, done)
        process = context.Process(target=calibrate_until_killed, args=args)
        process.start()
        process.join(timeout=120)
        assert process.exitcode == -signal.SIGKILL
        assert left(tmp_path) == {"uninterrupted", "out.partial"}
    told: list[tuple[str, int, int]] = []
    report = run(progress=lambda *report: told.append(report))
    assert told[0] == ("capture", 360, 360)
    assert_same(tensors(report.compressor), expected)
