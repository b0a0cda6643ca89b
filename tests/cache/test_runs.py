"""Schemes that scale runs of tokens together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cache.compressors import assert_parts_read_as_the_whole, random_ids
from tests.tiny_models import tiny_model
from vqkv.cache import BeforeUseCache, VQCache, attach
from vqkv.compressor import KVCompressor
from vqkv.errors import CacheError, SchemeError
from vqkv.geometry import Geometry
from vqkv.scheme import merge
from vqkv.scheme_files import load_scheme, scheme_from_dict
from vqkv.testing import check_cache

WINDOW = 10


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def compressor(model: Any) -> KVCompressor:
    small = {"values": {"transforms": [{"type": "token_scale", "stat": "minmax", "group": 16}]}}
    scheme = scheme_from_dict(merge(load_scheme("kivi-4").to_dict(), small))
    made = KVCompressor(scheme, Geometry.from_model(model))
    return made.with_residency(sinks=3, window=WINDOW)


def states(count: int = 200) -> torch.Tensor:
    return torch.randn(1, 2, count, 16, generator=torch.Generator().manual_seed(0))


def test_it_conforms(model: Any, compressor: KVCompressor) -> None:
    check_cache(compressor, model)


def test_any_part_reads_as_the_whole_does(model: Any, compressor: KVCompressor) -> None:
    cache = VQCache(compressor, model.config)
    cache.update(states(), states(), 0)
    assert_parts_read_as_the_whole(cache.coded_layers[0])
    keys, _ = cache.coded_layers[0].read(0, 200)
    # The codec's own ranges: a value is at most half a step of its run's range away.
    runs = states()[0, :, :128].unflatten(1, (4, 32))
    step = (runs.amax(2) - runs.amin(2)) / 16
    error = (keys[0, :, :128] - states()[0, :, :128]).abs().unflatten(1, (4, 32)).amax(2)
    assert bool((error <= 0.52 * step).all())


def test_it_is_coded_alike_however_tokens_come(model: Any, compressor: KVCompressor) -> None:
    caches = [VQCache(compressor, model.config) for _ in range(2)]
    for cache, sizes in zip(caches, ([200], [30, 1, 99, 70]), strict=True):
        for part in states().split(sizes, 2):
            cache.update(part, part, 0)
    first, second = (cache.coded_layers[0] for cache in caches)
    for name in ("key_codes", "key_side", "value_codes"):
        a, b = first.tensors()[name], second.tensors()[name]
        index = 1 if name.endswith("side") else 2
        assert torch.equal(a.narrow(index, 0, 128), b.narrow(index, 0, 128))


def test_cuts_go_between_runs_only(model: Any, compressor: KVCompressor) -> None:
    cache = VQCache(compressor, model.config)
    for layer in range(2):
        cache.update(states(), states(), layer)
    with pytest.raises(CacheError, match="its 128 coded tokens can be cut to a multiple of 32"):
        cache.crop(-100)
    assert cache.get_seq_length() == 200
    cache.crop(-60)  # inside the tail
    cache.crop(-44)
    assert cache.get_seq_length() == 96
    before = cache.coded_layers[0].read(0, 96)[0]
    for layer in range(2):
        cache.update(states(), states(), layer)
    assert torch.equal(cache.coded_layers[0].read(0, 96)[0], before)
    assert cache.coded_layers[0].coded == [256]


def test_padded_rows_have_runs_of_their_own(model: Any, compressor: KVCompressor) -> None:
    ids = torch.nn.functional.pad(random_ids(1, 180), (20, 0))
    mask = torch.ones_like(ids)
    mask[:, :20] = 0
    with attach(model, compressor) as attached, torch.no_grad():
        padded, plain = attached.new_cache(), attached.new_cache()
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=padded)
        model(ids[:, 20:], past_key_values=plain)
        read = [padded.coded_layers[1].read(20, 200), plain.coded_layers[1].read(0, 180)]
    assert padded.coded_layers[1].coded == [128]
    apart = (read[0][0] - read[1][0]).abs() > 1e-3
    assert apart.float().mean() < 0.01  # batched products round otherwise, which may flip a code


@pytest.mark.parametrize("length", [64, 70])
def test_before_use_fills_the_last_run_up(
    model: Any, compressor: KVCompressor, length: int
) -> None:
    cache = BeforeUseCache(compressor, model.config)
    start = states()[:, :, :length]
    keys, _ = cache.update(start, start, 0)
    assert keys.shape == (1, 2, length, 16)
    longer = BeforeUseCache(compressor, model.config)
    again, _ = longer.update(states(), states(), 0)
    assert torch.equal(keys[:, :, :64], again[:, :, :64])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"residency": {"window": 0}}, "runs of tokens need a window"),
        (
            {"keys": {"transforms": [{"type": "center"}, {"type": "page_scale"}]}},
            "transforms over runs of tokens are for streams that learn nothing",
        ),
    ],
)
def test_schemes_that_cannot_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        scheme_from_dict(merge(load_scheme("kivi-4").to_dict(), changes))


def test_a_refused_cut_leaves_every_layer_as_it_was(model: Any, compressor: KVCompressor) -> None:
    """Also where the layer that refuses is not the first."""
    scheme = compressor.scheme.to_dict()
    free = {"transforms": [{"type": "token_scale", "stat": "minmax"}]}
    changes = {"keys": free, "layers": [{"layers": [1], "keys": scheme["keys"]}]}
    mixed = KVCompressor(scheme_from_dict(merge(scheme, changes)), compressor.geometry)
    cache = VQCache(mixed, model.config)
    for layer in range(2):
        cache.update(states(), states(), layer)
    with pytest.raises(CacheError, match="cut to a multiple of 32"):
        cache.crop(-100)
    assert [layer.get_seq_length() for layer in cache.coded_layers.values()] == [200, 200]


def test_predicted_runs_before_use(model: Any, compressor: KVCompressor) -> None:
    copied = {"type": "copy", "sources": [{"stream": "values", "back": 1}]}
    plain = {"transforms": [{"type": "token_scale", "stat": "minmax"}]}
    runs = {"predictor": copied, "transforms": [{"type": "page_scale", "tokens": 32}]}
    changes = {"keys": plain, "values": plain, "layers": [{"layers": [1], "values": runs}]}
    scheme = scheme_from_dict(merge(compressor.scheme.to_dict(), changes))
    cache = BeforeUseCache(KVCompressor(scheme, compressor.geometry), model.config)
    part = states()[:, :, :40]
    cache.update(part, part, 0)
    _, values = cache.update(part, part + 1, 1)
    assert values.shape == part.shape
    assert (values - part - 1).abs().max() < 0.2
