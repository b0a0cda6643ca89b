"""Compressors for tiny models, fitted on the models' own states."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from vqkv.cache.rope import RotaryAdapter
from vqkv.compressor import KVCompressor, StateSource
from vqkv.geometry import Geometry
from vqkv.layouts import Stream
from vqkv.scheme_files import scheme_from_dict
from vqkv.states import States

VOCABULARY = 97


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Token ids without padding's."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, shape, generator=generator)


def scheme_dict(
    rope: str = "pre", *, quantizer: str = "product", sinks: int = 3, window: int = 10, **keys: Any
) -> dict[str, Any]:
    """A scheme of groups of 4 channels; `keys` overrides fields of the keys' block."""
    settings = {
        "product": {"type": "product", "code_bits": 5, "learner": {"type": "kmeans"}},
        "identity": {"type": "identity"},
    }[quantizer]
    stream: dict[str, Any] = {
        "grouping": {"type": "contiguous", "dim": 4},
        "quantizer": settings,
    }
    return {
        "name": f"{quantizer}-{rope}",
        "keys": {"rope": rope, **stream, **keys},
        "values": stream,
        "residency": {"sinks": sinks, "window": window},
    }


class ModelStates(StateSource):
    """States of a forward over random tokens, pre-RoPE keys where the scheme wants them."""

    def __init__(
        self, model: PreTrainedModel, geometry: Geometry, rope: str, tokens: int = 200
    ) -> None:
        self.rope = rope
        cache = DynamicCache(config=model.config.get_text_config())
        with torch.no_grad():
            model(random_ids(1, tokens, seed=9), past_key_values=cache)
        self.layers = cache.layers
        if rope == "pre":
            self.adapter = RotaryAdapter(model, geometry.compressed)
            self.positions = torch.arange(tokens)[None]

    def states(self, layer: int, stream: Stream) -> States:
        """Tokens `[N, H, D]`."""
        x: torch.Tensor = getattr(self.layers[layer], stream)
        if stream == "keys" and self.rope == "pre":
            x = self.adapter.unrotate(layer, x, self.adapter.tables(layer, self.positions))
        return States.of(x[0].transpose(0, 1))


def compressor_for(model: PreTrainedModel, rope: str = "pre", **scheme: Any) -> KVCompressor:
    """A usable compressor; keywords as for `scheme_dict`."""
    geometry = Geometry.from_model(model)
    compressor = KVCompressor(scheme_from_dict(scheme_dict(rope, **scheme)), geometry)
    if not compressor.fitted:
        compressor.fit(ModelStates(model, geometry, rope))
    return compressor


def assert_parts_read_as_the_whole(layer: Any) -> None:
    """A layer of 200 tokens, 128 of them coded, gives any part of them as it gives all."""
    assert layer.coded == [128]
    keys, values = layer.read(0, 200)
    for start, stop in ((0, 1), (5, 40), (33, 64), (100, 150), (127, 128)):
        part = layer.read(start, stop)
        assert torch.equal(part[0], keys[:, :, start:stop])
        assert torch.equal(part[1], values[:, :, start:stop])
