"""Reading through a kernel of attention on codes, against reading decoded states."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.cache.compressors import ModelStates, compressor_for, random_ids, scheme_dict
from tests.tiny_models import tiny_model
from vqkv.cache import attach, fused
from vqkv.cache.coded_attention import coded_attention
from vqkv.cache.layer import CodedStates
from vqkv.cache.masks import visible_slots
from vqkv.cache.rows import Rows
from vqkv.cache.vqcache import VQCache
from vqkv.compressor import KVCompressor
from vqkv.errors import KernelError
from vqkv.geometry import Geometry
from vqkv.kernels import gpu, native, recording, using
from vqkv.scheme_files import scheme_from_dict

QUANTIZER = {"type": "product", "code_bits": 8, "learner": {"type": "kmeans", "iterations": 2}}
PREDICTED: dict[str, Any] = {
    "predictor": {"type": "linear", "scope": "head", "sources": [{"stream": "keys", "back": 0}]},
    "transforms": [{"type": "spectral"}],
}


def byte_compressor(model: Any, rope: str, *, window: int = 10, **values: Any) -> KVCompressor:
    """Codes of a byte each, RoPE pairs whole where keys are coded before RoPE."""
    grouping = {"type": "rope_pairs" if rope == "pre" else "contiguous", "dim": 4}
    given = scheme_dict(rope, window=window)
    given["keys"] = {"rope": rope, "grouping": grouping, "quantizer": QUANTIZER}
    given["values"] = {"grouping": {"type": "strided", "dim": 4}, "quantizer": QUANTIZER, **values}
    geometry = Geometry.from_model(model)
    compressor = KVCompressor(scheme_from_dict(given), geometry)
    return compressor.fit(ModelStates(model, geometry, rope, tokens=320))


def logits(
    model: Any, compressor: KVCompressor, read: Any, sizes: tuple[int, ...], pads: tuple[int, ...]
) -> tuple[torch.Tensor, list[str]]:
    """Of a run of chunks over left-padded rows; and the kernels that ran."""
    total = sum(sizes)
    ids = random_ids(len(pads), total).to(model.device)
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    found, ran_all, start = [], [], 0
    with attach(model, compressor, read=read) as attached, torch.no_grad():
        cache = attached.new_cache()
        for size in sizes:
            stop = start + size
            with recording() as ran:
                out = model(
                    ids[:, start:stop],
                    attention_mask=mask[:, :stop],
                    position_ids=positions[:, start:stop],
                    past_key_values=cache,
                )
            found.append(out.logits[mask[:, start:stop].bool()])
            ran_all += ran
            start = stop
    return torch.cat(found), ran_all


@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize(
    "family", ["llama", "llama-mqa", "llama-yarn", "glm", "smollm3", "qwen3", "gpt_oss"]
)
def test_fused_reads_are_decoded_reads(family: str, rope: str) -> None:
    model = tiny_model(family, max_position_embeddings=1024)
    compressor = byte_compressor(model, rope, **(PREDICTED if family == "llama" else {}))
    sizes, pads = (200, 1, 1, 10, 1), (10, 0, 80)
    expected, _ = logits(model, compressor, "decode", sizes, pads)
    with using(attend_codes="naive"):
        found, ran = logits(model, compressor, "attend", sizes, pads)
    layers = len(compressor.geometry.compressed)
    assert ran.count("attend_codes.naive") == 4 * layers and "attend.naive" not in ran
    # The last step codes no page, so nothing is decoded, predicted values included.
    last = [name.partition(".")[0] for name in ran[-2 * layers :]]
    assert last == ["attend_codes", "attend_rest"] * layers
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


compiled = pytest.mark.skipif(
    not native.available(), reason="the package was built without a C compiler"
)


@compiled
@pytest.mark.parametrize("rope", ["pre", "post"])
def test_steps_over_many_pages_are_decoded_reads(rope: str) -> None:
    """Where codes begin, end and lie changes from page to page; readers follow."""
    model = tiny_model("llama")
    compressor = byte_compressor(model, rope)
    sizes, pads = (100, *[1] * 200), (0, 30)
    expected, _ = logits(model, compressor, "decode", sizes, pads)
    found, ran = logits(model, compressor, "attend", sizes, pads)
    assert ran.count("attend_codes.cpu") >= 200
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=5e-3)


@compiled
def test_a_kernel_asked_for_between_steps_is_used() -> None:
    model = tiny_model("llama")
    with attach(model, byte_compressor(model, "pre")) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(random_ids(1, 200), past_key_values=cache)
        for kernel in ("cpu", "naive", "cpu"):
            with using(attend_codes=kernel), recording() as ran:
                model(random_ids(1, 1), past_key_values=cache)
            assert {name for name in ran if "attend_codes" in name} == {f"attend_codes.{kernel}"}


@contextmanager
def read_cache(read: Any = "auto") -> Iterator[tuple[Any, VQCache]]:
    """A model, and a cache of it whose codes a fused kernel has read."""
    model = tiny_model("llama", max_position_embeddings=1024)
    with attach(model, byte_compressor(model, "pre"), read=read) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(random_ids(2, 200), past_key_values=cache)
        with recording() as ran:
            model(random_ids(2, 1), past_key_values=cache)
        assert "attend_codes.cpu" in ran
        yield model, cache


def codes_of(cache: VQCache) -> list[weakref.ref[torch.Tensor]]:
    return [weakref.ref(s.codes) for layer in cache.coded_layers.values() for s in layer.stores]


def alive(codes: list[weakref.ref[torch.Tensor]]) -> int:
    gc.collect()
    return sum(each() is not None for each in codes)


@compiled
def test_codes_that_moved_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    with read_cache() as (model, cache):
        codes = codes_of(cache)
        model(random_ids(2, 400), past_key_values=cache)  # too many rows for a fused kernel
        assert alive(codes) == 0
        model(random_ids(2, 1), past_key_values=cache)
        codes = codes_of(cache)
        for layer in cache.coded_layers.values():
            layer.make_room(4096)
        assert alive(codes) == 0
        model(random_ids(2, 1), past_key_values=cache)
        codes, layers = codes_of(cache), list(cache.coded_layers.values())
        layers[0].reorder_cache(torch.tensor([1, 0]))
        assert alive(codes) == len(codes) - 2  # one layer at a time
        codes = codes_of(cache)
        # What another device would do.
        monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: tensor.clone())
        for layer in layers:
            layer.offload()
        assert alive(codes) == 0


@compiled
def test_a_cache_that_leaves_its_model_forgets_how_it_was_read() -> None:
    with read_cache() as (_, cache):
        assert cache.rows.readings
    assert not cache.rows.readings and not cache.rows.shared


@compiled
def test_caches_that_were_read_can_be_pickled() -> None:
    with read_cache() as (model, cache):
        loaded = pickle.loads(pickle.dumps(cache))
        one = random_ids(2, 1)
        expected = model(one, past_key_values=cache).logits
    with attach(model, loaded.compressor), torch.no_grad(), recording() as ran:
        found = model(one, past_key_values=loaded).logits
    assert "attend_codes.cpu" in ran
    torch.testing.assert_close(found, expected)


def test_pickled_rows_keep_padding_and_positions() -> None:
    rows = Rows()
    rows.note(0, torch.arange(3)[None].int(), [2])
    loaded = pickle.loads(pickle.dumps(rows))
    assert loaded.pads == [2] and loaded.positions.tolist() == [[0, 1, 2]]
    assert not loaded.shared and not loaded.readings and loaded.rotary is None


def positions(start: int, stop: int, firsts: tuple[int, int]) -> torch.Tensor:
    """Of rows that begin at other positions."""
    return torch.arange(start, stop) + torch.tensor(firsts)[:, None]


@compiled
def test_turns_follow_rows_that_are_reordered_or_come_after_a_reset() -> None:
    with read_cache() as (model, cache):
        cache.reset()
        ids, one = random_ids(2, 205), random_ids(2, 1)
        model(ids, past_key_values=cache, position_ids=positions(0, 205, (0, 300)))
        model(one, past_key_values=cache, position_ids=positions(205, 206, (0, 300)))
        cache.reorder_cache(torch.tensor([1, 0]))
        fresh = copy.deepcopy(cache)  # without what layers share
        found, expected = (
            model(one, past_key_values=each, position_ids=positions(206, 207, (300, 0))).logits
            for each in (cache, fresh)
        )
        assert torch.equal(found, expected)
        cache.reset()
        other = VQCache(cache.compressor, model.config)
        for each in (cache, other):
            model(ids, past_key_values=each, position_ids=positions(0, 205, (100, 7)))
        found, expected = (
            model(one, past_key_values=each, position_ids=positions(205, 206, (100, 7))).logits
            for each in (cache, other)
        )
        assert torch.equal(found, expected)


@compiled
def test_codes_that_are_loaded_are_read() -> None:
    with read_cache() as (model, cache):
        layer = cache.coded_layers[0]
        tensors = {name: tensor.clone() for name, tensor in layer.tensors().items()}
        tensors["key_codes"].zero_()
        layer.load_tensors(tensors, list(layer.coded), layer.get_seq_length())
        fresh, one = copy.deepcopy(cache), random_ids(2, 1)
        found, expected = (model(one, past_key_values=each).logits for each in (cache, fresh))
        assert torch.equal(found, expected)


@compiled
def test_torchs_default_device_does_not_matter() -> None:
    with read_cache() as (_, cache):
        layer = cache.coded_layers[0]
        query = torch.randn(2, 4, 1, layer.key_codec.head_dim)
        expected = fused.fused_attention(layer, query, 1.0, None)
        cache.rows.forget_readings()
        with torch.device("meta"):
            found = fused.fused_attention(layer, query, 1.0, None)
        torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_exact_states_may_differ_in_type() -> None:
    """Under autocast RoPE leaves keys in fp32 and values in bf16."""
    model = tiny_model("llama", max_position_embeddings=1024)
    compressor = byte_compressor(model, "pre")
    sizes, pads = (10,) * 25, (0,)
    expected, _ = logits(model, compressor, "attend", sizes, pads)
    with torch.autocast("cpu", torch.bfloat16):
        found, ran = logits(model, compressor, "attend", sizes, pads)
    assert any(name.startswith("attend_rest") for name in ran)
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.skipif(not gpu.installed(), reason="Triton is not installed")
@pytest.mark.parametrize("rope", ["pre", "post"])
def test_a_model_reads_codes_in_triton(rope: str) -> None:
    model = tiny_model("llama", max_position_embeddings=1024)
    compressor = byte_compressor(model, rope, **PREDICTED)
    sizes, pads = (200, 1), (10, 80)
    expected, _ = logits(model, compressor, "decode", sizes, pads)
    with using(attend_codes="triton", attend_rest="triton"):
        found, ran = logits(model, compressor, "attend", sizes, pads)
    for kernel in ("attend_codes.triton", "attend_rest.triton"):
        assert ran.count(kernel) == len(compressor.geometry.compressed)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


def test_auto_attends_where_a_kernel_takes_the_codes() -> None:
    model = tiny_model("llama", max_position_embeddings=1024)
    bytes_, others = byte_compressor(model, "pre"), compressor_for(model)
    with using(attend_codes="naive"):
        with attach(model, bytes_) as attached:
            assert attached.read == "attend"
        with pytest.raises(KernelError, match="codes of 5 bits"), attach(model, others):
            pass
    with attach(model, others) as attached:
        assert attached.read == "decode"


def test_auto_decodes_where_the_model_attends_in_another_way() -> None:
    model = tiny_model("gemma2", max_position_embeddings=1024)
    with using(attend_codes="naive"), attach(model, byte_compressor(model, "pre")) as attached:
        assert attached.read == "decode"


def test_the_naive_kernel_is_not_chosen_over_decoding_blocks() -> None:
    model = tiny_model("llama", max_position_embeddings=1024)
    compressor = byte_compressor(model, "post")
    _, ran = logits(model, compressor, "attend", (200, 1), (0,))
    assert "attend_codes.naive" not in ran


def tree_mask(hidden: range) -> torch.Tensor:
    """Two queries that do not see each other; the second does not see `hidden` slots either."""
    mask = torch.ones(1, 1, 2, 202, dtype=torch.bool)
    mask[..., 0, 201] = mask[..., 1, 200] = False
    mask[..., 1, hidden] = False
    return mask


def padding_mask(hidden: range) -> torch.Tensor:
    """As flash attention is given it: of slots alone, causal beside it."""
    mask = torch.ones(1, 202, dtype=torch.long)
    mask[:, hidden] = 0
    return mask


@pytest.mark.parametrize("masked", [tree_mask, padding_mask])
@pytest.mark.parametrize("hidden", [range(0), range(5, 9), range(194, 197)])
def test_masks_are_honoured(masked: Callable[[range], torch.Tensor], hidden: range) -> None:
    """Where one hides coded tokens, as of a tree of candidates, codes are decoded."""
    model = tiny_model("llama", max_position_embeddings=1024)
    compressor = byte_compressor(model, "post")
    with attach(model, compressor) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(random_ids(1, 202), past_key_values=cache)
        layer = cache.coded_layers[0]
        assert layer.coded == [192]
        query = torch.randn(1, 4, 2, 16, generator=torch.Generator().manual_seed(0))
        with recording() as ran, using(attend_codes="naive"):
            found, _ = coded_attention(model, query, CodedStates(layer), masked(hidden))
        assert ("attend_codes.naive" in ran) == (5 not in hidden)
        keys, values = layer.read(0, 202)
        seen = visible_slots(masked(hidden), 2, 202, query.device)
        expected = torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=seen, enable_gqa=True
        )
    torch.testing.assert_close(found.transpose(1, 2), expected, atol=2e-5, rtol=2e-5)


def test_positions_with_gaps_are_decoded() -> None:
    model = tiny_model("llama", max_position_embeddings=1024)
    compressor = byte_compressor(model, "pre")
    ids = random_ids(1, 201)
    positions = torch.cat([torch.arange(50), torch.arange(60, 211)])[None]
    found = {}
    for read in ("decode", "attend"):
        with (
            attach(model, compressor, read=read) as attached,
            torch.no_grad(),
            using(attend_codes="naive"),
            recording() as ran,
        ):
            cache = attached.new_cache()
            for part, at in zip(ids.split(200, 1), positions.split(200, 1), strict=True):
                found[read] = model(part, position_ids=at, past_key_values=cache).logits
    assert "attend_codes.naive" not in ran and "attend.naive" in ran
    torch.testing.assert_close(found["attend"], found["decode"], atol=2e-5, rtol=2e-5)


def test_positions_coded_again_after_a_crop_are_looked_at_again() -> None:
    model = tiny_model("llama", max_position_embeddings=1024)
    compressor = byte_compressor(model, "pre", window=0)
    ids = random_ids(1, 200)
    found = {}
    for read in ("decode", "attend"):
        with (
            attach(model, compressor, read=read) as attached,
            torch.no_grad(),
            using(attend_codes="naive"),
        ):
            cache = attached.new_cache()
            model(ids[:, :129], past_key_values=cache)
            model(ids[:, 129:130], past_key_values=cache)
            cache.crop(-66)
            shifted = torch.arange(100, 166)[None]
            model(ids[:, 130:196], position_ids=shifted, past_key_values=cache)
            last = torch.tensor([[166]])
            found[read] = model(ids[:, 196:197], position_ids=last, past_key_values=cache).logits
    torch.testing.assert_close(found["attend"], found["decode"], atol=2e-5, rtol=2e-5)


def test_values_predicted_from_keys_are_decoded_where_no_fused_kernel_reads_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fused, "_unread", lambda layout, device: "there is none")
    model = tiny_model("llama", max_position_embeddings=1024)
    compressor = byte_compressor(model, "post", **PREDICTED)
    expected, _ = logits(model, compressor, "decode", (200, 1, 10), (0, 80))
    found, ran = logits(model, compressor, "attend", (200, 1, 10), (0, 80))
    assert "attend.naive" in ran and not any("attend_codes" in name for name in ran)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


@compiled
@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize("family", ["llama", "llama-yarn", "gpt_oss"])
def test_compiled_reads_are_decoded_reads(family: str, rope: str) -> None:
    model = tiny_model(family, max_position_embeddings=1024)
    compressor = byte_compressor(model, rope, **(PREDICTED if family == "llama" else {}))
    sizes, pads = (200, 1, 1, 10, 1), (10, 0, 80)
    expected, _ = logits(model, compressor, "decode", sizes, pads)
    with using(attend_codes="cpu"):
        found, ran = logits(model, compressor, "auto", sizes, pads)
        with native.forced_level("baseline"):
            exact, _ = logits(model, compressor, "auto", sizes, pads)
    assert "attend_codes.cpu" in ran and "attend.naive" not in ran
    torch.testing.assert_close(exact, expected, atol=2e-5, rtol=2e-5)
    # bfloat16 operands, where this CPU has products of them
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)
