"""Plans agree with what caches and artefacts really take."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_models import tiny_config, tiny_model
from vqkv.compressor import KVCompressor, StateSource
from vqkv.errors import VQKVError
from vqkv.geometry import Geometry
from vqkv.layouts import Stream
from vqkv.planning import plan
from vqkv.scheme_files import load_scheme
from vqkv.states import States


def test_bytes_are_those_of_a_real_cache() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16, max_position_embeddings=1024)
    scheme = load_scheme("scalar-2bit")
    compressor = KVCompressor(scheme, Geometry.from_config(model.config))
    cache = compressor.new_cache(model.config)
    with torch.no_grad():
        model(torch.randint(97, (2, 400)), past_key_values=cache)
    planned = plan(model.config, scheme, 10**9, batch=2, context=400)
    assert planned.context_bytes is not None
    assert planned.context_bytes - planned.side_bytes == cache.nbytes()["total"]
    assert planned.context_bytes_exact == cache.nbytes_exact()
    assert planned.side_bytes == compressor.nbytes()
    assert planned.weights_bytes == 2 * sum(p.numel() for p in model.parameters())


def test_every_length_up_to_the_longest_fits_and_soon_after_one_does_not() -> None:
    # The tail is exact, so a length just before a page fills takes more than one just after.
    config = tiny_config("llama")
    scheme = load_scheme("cq-4c8b")

    def fits(context: int) -> bool | None:
        return plan(config, scheme, 500_000, batch=3, context=context).context_fits

    longest = plan(config, scheme, 500_000, batch=3).longest_context
    assert all(fits(length) for length in range(longest - 130, longest + 1))
    assert not all(fits(length) for length in range(longest, longest + 130))


def test_side_bytes_planned_are_those_fitted() -> None:
    compressor = KVCompressor(load_scheme("cq-8c8b"), Geometry.from_config(tiny_config("llama")))
    states = torch.randn(300, 2, 16, generator=torch.Generator().manual_seed(0))

    class Source(StateSource):
        def states(self, layer: int, stream: Stream) -> States:
            return States.of(states)

    planned = compressor.planned_side_bytes()
    assert planned == compressor.fit(Source()).nbytes()


def test_memory_that_the_weights_fill() -> None:
    with pytest.raises(VQKVError, match="the weights take"):
        plan(tiny_config("llama"), load_scheme("cq-4c8b"), 1000)
