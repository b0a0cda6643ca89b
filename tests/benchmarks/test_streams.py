"""One stream coded, the other exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.streams import one_stream_arms
from tests.cache.compressors import compressor_for, random_ids
from tests.tiny_models import tiny_model
from vqkv.cache import attach
from vqkv.cache.before_use import BeforeUseCache
from vqkv.evaluation.exact import ExactLogits
from vqkv.scheme import STREAMS


def test_the_other_stream_is_as_it_was(tmp_path: Path) -> None:
    model = tiny_model("llama")
    compressor = compressor_for(model, "pre", window=0, sinks=2)
    ids = random_ids(1, 24)
    exact = ExactLogits(model, tmp_path)
    losses = {}
    for stream in STREAMS:
        arms, tally = one_stream_arms(model, compressor, stream, exact)
        losses[stream] = float(arms.scores(ids[0]).kl.mean())
        assert 0 < tally.error < tally.energy and tally.spread <= tally.energy
    with attach(model, compressor), torch.inference_mode():
        both = model(ids, past_key_values=BeforeUseCache(compressor, model.config)).logits
    with torch.inference_mode():
        whole = model(ids).logits
    assert not torch.allclose(both, whole)
    assert min(losses.values()) > 0 and losses["keys"] != pytest.approx(losses["values"])


def test_exactly_coded_streams_lose_nothing(tmp_path: Path) -> None:
    model = tiny_model("llama")
    compressor = compressor_for(model, "post", window=0, sinks=24)
    exact = ExactLogits(model, tmp_path)
    arms, _ = one_stream_arms(model, compressor, "keys", exact)
    assert float(arms.scores(random_ids(1, 24)[0]).kl.mean()) == pytest.approx(0, abs=1e-6)
