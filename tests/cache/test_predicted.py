"""Streams that are predicted from other streams, in every kind of cache."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.cache.compressors import ModelStates, random_ids, scheme_dict
from tests.tiny_models import tiny_model
from vqkv.cache import BeforeUseCache, VQCache, attach
from vqkv.compressor import KVCompressor, StateSource
from vqkv.errors import KernelError, StateError
from vqkv.geometry import Geometry
from vqkv.kernels import recording
from vqkv.layouts import Stream
from vqkv.scheme_files import scheme_from_dict
from vqkv.states import States

KEYS = [{"stream": "keys", "back": 1}, {"stream": "values", "back": 1}]
VALUES = [{"stream": "keys", "back": 0}, *KEYS]
LAYERS = 3


def predicted_scheme(rope: str = "pre", **changes: Any) -> dict[str, Any]:
    scheme = scheme_dict(rope, **changes)
    scheme["keys"] = {**scheme["keys"], "predictor": {"type": "linear", "sources": KEYS}}
    scheme["values"] = {**scheme["values"], "predictor": {"type": "linear", "sources": VALUES}}
    scheme["layers"] = [
        {
            "layers": [0],
            "keys": {"predictor": None},
            "values": {"predictor": {"type": "linear", "sources": [VALUES[0]]}},
        }
    ]
    return scheme


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", max_position_embeddings=1024, num_hidden_layers=LAYERS)


def fitted(model: Any, rope: str) -> KVCompressor:
    geometry = Geometry.from_model(model)
    made = KVCompressor(scheme_from_dict(predicted_scheme(rope)), geometry)
    return made.fit(ModelStates(model, geometry, rope))


@pytest.fixture(scope="module", params=["pre", "post"])
def compressor(model: Any, request: pytest.FixtureRequest) -> KVCompressor:
    return fitted(model, request.param)


@pytest.fixture(scope="module")
def after_rope(model: Any) -> KVCompressor:
    """Its cache takes states that no model has rotated."""
    return fitted(model, "post")


def random_states(tokens: int) -> list[torch.Tensor]:
    """Keys and values of each layer in turn."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, tokens, 16, generator=generator) for _ in range(2 * LAYERS)]


def chain(compressor: KVCompressor, states: StateSource) -> Iterator[tuple[Any, torch.Tensor]]:
    """Every stream's reconstruction `[N, H, D]`, by hand."""
    done: dict[tuple[int, Stream], torch.Tensor] = {}
    for (layer, stream), codec in compressor.codecs():
        x = torch.cat(list(states.states(layer, stream).chunks()))
        back = {source: done[layer - b, source] for source, b in codec.layout.sources}
        sources = [done[layer - b, source] for source, b in codec.layout.sources]
        assert len(back) <= len(sources)
        done[layer, stream] = codec.decode(codec.encode(x, sources), sources)
        yield (layer, stream), done[layer, stream]


def test_a_predictor_learns_from_reconstructions_in_model_order(model: Any) -> None:
    geometry = Geometry.from_model(model)
    asked: list[tuple[int, Stream]] = []
    kept: set[tuple[int, Stream]] = set()
    most = 0

    class Watched(ModelStates):
        def kept(self, layer: int, stream: Stream, states: States) -> States:
            nonlocal most
            asked.append((layer, stream))
            kept.add((layer, stream))
            most = max(most, len(kept))
            return super().kept(layer, stream, states)

        def forget(self, layer: int, stream: Stream) -> None:
            kept.remove((layer, stream))

    made = KVCompressor(scheme_from_dict(predicted_scheme()), geometry)
    states = Watched(model, geometry, "pre")
    made.fit(states)
    assert asked == [(0, "keys"), (0, "values"), (1, "keys"), (1, "values"), (2, "keys")]
    assert most == 4, "only what is still needed is kept"
    for (layer, stream), decoded in chain(made, states):
        codec = made.codec(layer, stream)
        assert codec.predictor is None or (layer, stream) != (0, "keys")
        x = torch.cat(list(states.states(layer, stream).chunks()))
        assert (decoded - x).square().mean() < x.var(0).mean()


def test_prediction_lowers_the_error_of_what_it_can_predict() -> None:
    """Layer 1 is layer 0 turned, so that it costs nothing beyond layer 0's own error."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(2000, 2, 16, generator=generator)
    turn = torch.linalg.qr(torch.randn(32, 32, generator=generator))[0]
    second = (first.flatten(1) @ turn).view_as(first)

    class Source(StateSource):
        def states(self, layer: int, stream: Stream) -> States:
            return States.of(second if layer else first)

    geometry = Geometry("llama", 2, (0, 1), 2, 2, 16, False, None)
    errors = {}
    for predicted in (False, True):
        scheme = predicted_scheme("post") if predicted else scheme_dict("post")
        made = KVCompressor(scheme_from_dict(scheme), geometry).fit(Source())
        decoded = dict(chain(made, Source()))
        errors[predicted] = float((decoded[1, "keys"] - second).square().mean())
    assert errors[True] < 0.5 * errors[False]


@pytest.mark.parametrize("pads", [(0, 0), (0, 37)])
def test_the_cache_reads_what_the_chain_gives(
    model: Any, compressor: KVCompressor, pads: tuple[int, int]
) -> None:
    ids = torch.cat([torch.nn.functional.pad(random_ids(1, 200 - p), (p, 0)) for p in pads])
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with attach(model, compressor) as attached, torch.no_grad():
        cache = attached.new_cache()
        for start, stop in ((0, 60), (60, 170), (170, 171), (171, 200)):
            model(
                ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
            )
            assert not cache.rows.decoded._held, "nothing of a forward stays"
        # Row by row: decode the stored codes along the chain.
        for row, pad in enumerate(pads):
            done: dict[tuple[int, Stream], torch.Tensor] = {}
            for (layer, stream), codec in compressor.codecs():
                held = cache.coded_layers[layer]
                stored = held._store(stream).read(torch.tensor([row]), 0, held.coded[row])
                sources = [done[key] for key in compressor.sources(layer, stream)]
                done[layer, stream] = codec.decode(stored, sources)
            for layer, held in cache.coded_layers.items():
                held._share_history(later=True)
                held.share_history()
                values = held.read(0, 200)[1][row]
                coded = slice(pad + held.sinks, pad + held.coded[row])
                expected = done[layer, "values"].transpose(0, 1)
                torch.testing.assert_close(
                    values[:, coded], expected[:, held.sinks :], atol=1e-5, rtol=1e-5
                )
                assert held.coded[row] > 0


def test_chunks_give_what_one_forward_gives(model: Any, after_rope: KVCompressor) -> None:
    """What is coded depends on states and on codes before, not on how tokens came in."""
    caches = [VQCache(after_rope, model.config) for _ in range(2)]
    states = random_states(200)
    for cache, sizes in zip(caches, ([200], [50, 1, 99, 50]), strict=True):
        start = 0
        for size in sizes:
            for layer in range(LAYERS):
                keys, values = (x[:, :, start : start + size] for x in states[2 * layer :][:2])
                cache.update(keys, values, layer)
            start += size
    for one, many in zip(*(c.coded_layers.values() for c in caches), strict=True):
        coded = min(one.coded[0], many.coded[0])
        assert coded > 0
        for name in ("key_codes", "value_codes"):
            assert torch.equal(
                one.tensors()[name][:, :, :coded], many.tensors()[name][:, :, :coded]
            )


def test_copies_crops_and_goes_on(model: Any, compressor: KVCompressor) -> None:
    ids = random_ids(1, 240)
    with attach(model, compressor) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(ids[:, :200], past_key_values=cache)
        copied = copy.deepcopy(cache)
        logits = model(ids[:, 200:], past_key_values=cache).logits
        assert torch.equal(model(ids[:, 200:], past_key_values=copied).logits, logits)
        cache.crop(-40)
        model(ids[:, 200:], past_key_values=cache)
        cache.crop(-150)
        model(ids[:, 90:], past_key_values=cache)
        assert cache.get_seq_length() == 240


def test_before_use_is_the_chain(model: Any, after_rope: KVCompressor) -> None:
    states = [
        torch.randn(1, 2, 50, 16, generator=torch.Generator().manual_seed(i)) for i in range(6)
    ]
    cache = BeforeUseCache(after_rope, model.config)
    done: dict[tuple[int, Stream], torch.Tensor] = {}
    for layer in range(LAYERS):
        read = cache.update(states[2 * layer], states[2 * layer + 1], layer)
        for stream, x, got in zip(("keys", "values"), states[2 * layer :], read, strict=False):
            codec = after_rope.codec(layer, stream)  # type: ignore[arg-type]
            sources = [done[key] for key in after_rope.sources(layer, stream)]  # type: ignore[arg-type]
            decoded = codec.decode(codec.encode(x[0].transpose(0, 1), sources), sources)
            done[layer, stream] = decoded  # type: ignore[index]
            sinks = after_rope.scheme.residency.sinks
            torch.testing.assert_close(got[0, :, sinks:], decoded.transpose(0, 1)[:, sinks:])
    assert not cache.rows.decoded._held


def test_heads_that_are_mixed_are_refused_for_attend(model: Any, compressor: KVCompressor) -> None:
    with pytest.raises(KernelError, match="mix heads"), attach(model, compressor, read="attend"):
        pass


@pytest.mark.parametrize("window", [0, 10])
@pytest.mark.parametrize("rope", ["pre", "post"])
def test_attend_on_values_that_are_predicted_head_by_head(
    model: Any, rope: str, window: int
) -> None:
    geometry = Geometry.from_model(model)
    scheme = scheme_dict(rope, window=window)
    predictor = {"type": "linear", "scope": "head", "sources": [VALUES[0]]}
    scheme["values"] = {**scheme["values"], "predictor": predictor}
    made = KVCompressor(scheme_from_dict(scheme), geometry)
    made.fit(ModelStates(model, geometry, rope))
    ids, logits = random_ids(2, 200), {}
    for read in ("decode", "attend"):
        with attach(model, made, read=read) as attached, torch.no_grad():
            cache = attached.new_cache()
            outputs = []
            for part in ids.split([188, 1, 9, 1, 1], 1):
                with recording() as ran:
                    outputs.append(model(part, past_key_values=cache).logits)
                assert ("attend.naive" in ran) == (read == "attend" and part.shape[1] < 100)
                assert not cache.rows.decoded._held
        logits[read] = torch.cat(outputs, 1)
    torch.testing.assert_close(logits["decode"], logits["attend"], atol=1e-5, rtol=1e-5)


def test_sources_that_are_missing(compressor: KVCompressor) -> None:
    with pytest.raises(StateError, match=r"keys of layer 1: it is predicted from 2 .*given \[\]"):
        compressor.encode(1, "keys", torch.randn(1, 2, 5, 16))


def test_a_copied_stream_stores_nothing(model: Any) -> None:
    geometry = Geometry.from_model(model)
    scheme = scheme_dict("pre")
    copied = {
        "predictor": {"type": "copy", "sources": [{"stream": "keys", "back": 1}]},
        "quantizer": {"type": "product", "code_bits": 0},
    }
    scheme["layers"] = [{"layers": [1], "keys": copied}]
    made = KVCompressor(scheme_from_dict(scheme), geometry)
    made.fit(ModelStates(model, geometry, "pre"))
    assert made.codec(1, "keys").layout.bytes_per_token == 0
    with attach(model, made) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(random_ids(1, 200), past_key_values=cache)
        assert cache.coded_layers[1].tensors()["key_codes"].numel() == 0
