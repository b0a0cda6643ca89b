"""Plans agree with what caches and artefacts really take."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_models import tiny_config, tiny_model
from vqkv.cache import attach
from vqkv.compressor import KVCompressor, StateSource
from vqkv.errors import SchemeError, VQKVError
from vqkv.geometry import Geometry
from vqkv.layouts import Stream
from vqkv.planning import plan
from vqkv.scheme import Scheme, merge
from vqkv.scheme_files import load_scheme, scheme_from_dict
from vqkv.states import States


def pre_rope() -> Scheme:
    """Data-free and pre-RoPE, so that a cache keeps positions."""
    return scheme_from_dict(merge(load_scheme("scalar-2bit").to_dict(), {"keys": {"rope": "pre"}}))


@pytest.mark.parametrize("scheme", [load_scheme("scalar-2bit"), pre_rope()], ids=["post", "pre"])
def test_bytes_are_those_of_a_real_cache(scheme: Scheme) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16, max_position_embeddings=1024)
    compressor = KVCompressor(scheme, Geometry.from_config(model.config))
    with attach(model, compressor) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(torch.randint(97, (2, 400)), past_key_values=cache)
    planned = plan(model.config, scheme, 10**9, batch=2, context=400)
    assert planned.context_bytes is not None
    assert planned.context_bytes - planned.side_bytes == cache.nbytes()["total"]
    assert planned.context_bytes_exact == cache.nbytes_exact()
    assert planned.side_bytes == compressor.nbytes()
    assert planned.weights_bytes == 2 * sum(p.numel() for p in model.parameters())


def test_room_that_a_growing_cache_keeps_is_planned_for() -> None:
    # 50 pages, born one at a time: up to two of them are room for later tokens.
    model = tiny_model("llama", dtype=torch.bfloat16, max_position_embeddings=4096)
    scheme = merge(pre_rope().to_dict(), {"residency": {"window": 0}})
    compressor = KVCompressor(scheme_from_dict(scheme), Geometry.from_config(model.config))
    spare = set()
    with attach(model, compressor) as attached, torch.no_grad():
        cache = attached.new_cache()
        for tokens in range(64, 50 * 64, 64):
            model(torch.randint(97, (1, 64)), past_key_values=cache, logits_to_keep=1)
            planned = plan(model.config, compressor.scheme, 10**9, context=tokens)
            assert planned.context_bytes is not None
            room = planned.context_bytes - planned.side_bytes - cache.nbytes()["total"]
            spare.add(room // (64 * planned.bytes_per_token))
    assert min(spare) == 0
    assert max(spare) <= 2


def test_every_length_up_to_the_longest_fits_and_soon_after_one_does_not() -> None:
    # The tail is exact, so a length just before a page fills takes more than one just after.
    config = tiny_config("llama")
    scheme = load_scheme("cq-4c8b")

    def fits(context: int) -> bool | None:
        return plan(config, scheme, 500_000, batch=3, context=context).context_fits

    longest = plan(config, scheme, 500_000, batch=3).longest_context
    assert all(fits(length) for length in range(longest - 130, longest + 1))
    assert not fits(longest + 1)


def test_a_scheme_that_stores_nothing() -> None:
    nothing = {"grouping": {"dim": 4}, "quantizer": {"type": "product", "code_bits": 0}}
    scheme = scheme_from_dict(
        merge(load_scheme("cq-4c8b").to_dict(), {"keys": nothing, "values": nothing})
    )
    with pytest.raises(SchemeError, match="'cq-4c8b' stores 0 bits of a coded token"):
        plan(tiny_config("llama"), scheme, 10**9)


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
