"""Runs whose tokens share their bits, in a cache, predicted across layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cache.compressors import ModelStates, assert_parts_read_as_the_whole
from tests.tiny_models import tiny_model
from vqkv.cache import BeforeUseCache, VQCache
from vqkv.compressor import KVCompressor
from vqkv.geometry import Geometry
from vqkv.scheme_files import scheme_from_dict
from vqkv.testing import check_cache

KEYS = {"type": "linear", "sources": [{"stream": "keys", "back": 0}]}


def fitted(model: Any, predictor: dict[str, Any] | None) -> KVCompressor:
    """Trellis codes of all heads together, values predicted or not."""
    stream = {
        "transforms": [{"type": "center"}],
        "grouping": {"type": "whole", "scope": "layer"},
        "quantizer": {"type": "trellis", "rate": 2, "memory": 6},
    }
    plain = {
        "name": "shared-bits",
        "keys": {"rope": "post", **stream},
        "values": {"predictor": predictor, **stream},
        "residency": {"sinks": 3, "window": 10},
    }
    geometry = Geometry.from_model(model)
    made = KVCompressor(scheme_from_dict(plain), geometry)
    made.fit(ModelStates(model, geometry, "post", tokens=500))
    return made


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def compressor(model: Any) -> KVCompressor:
    return fitted(model, None)


def states(count: int = 200) -> torch.Tensor:
    return torch.randn(1, 2, count, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("predictor", [None, KEYS])
def test_it_conforms(model: Any, predictor: dict[str, Any] | None) -> None:
    check_cache(fitted(model, predictor), model)


def test_any_part_reads_as_the_whole_does(model: Any, compressor: KVCompressor) -> None:
    cache = VQCache(compressor, model.config)
    cache.update(states(), states(), 0)
    assert_parts_read_as_the_whole(cache.coded_layers[0])


@pytest.mark.parametrize("length", [64, 70])
def test_before_use_fills_the_last_run_up(
    model: Any, compressor: KVCompressor, length: int
) -> None:
    start = states()[:, :, :length]
    keys, values = BeforeUseCache(compressor, model.config).update(start, start, 0)
    assert keys.shape == values.shape == (1, 2, length, 16)
    again, _ = BeforeUseCache(compressor, model.config).update(states(), states(), 0)
    assert torch.equal(keys[:, :, :64], again[:, :, :64])


def test_a_saved_compressor_codes_alike(
    compressor: KVCompressor, tmp_path: Any, model: Any
) -> None:
    compressor.save_pretrained(tmp_path / "saved")
    loaded = KVCompressor.from_pretrained(tmp_path / "saved", model.config)
    found = []
    for each in (compressor, loaded):
        cache = VQCache(each, model.config)
        cache.update(states(), states(), 0)
        found.append(cache.coded_layers[0].tensors()["key_codes"])
    assert torch.equal(*found)
