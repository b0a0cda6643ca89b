"""Peers are measured by the same code as our schemes, and their bytes are those of real tensors."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch

from benchmarks.peers.base import Peer
from benchmarks.peers.cache import opener
from benchmarks.peers.faiss_codecs import FaissPeer, FaissPQ, FaissRQ
from benchmarks.peers.measure import Bench, coding_times, stored_bytes
from benchmarks.peers.quantized_cache import OTHER_AXIS, Backend, Grouping, QuantizedCachePeer
from benchmarks.peers.roster import BEST_AXES, roster
from tests.cache.compressors import compressor_for, random_ids
from tests.tiny_checkpoint import tiny_text, tiny_tokenizer
from tests.tiny_models import tiny_model
from vqkv.calibration import Text, read_text
from vqkv.compressor import KVCompressor
from vqkv.errors import CacheError
from vqkv.evaluation import evaluate
from vqkv.evaluation.compare import Settings
from vqkv.evaluation.exact import ExactLogits
from vqkv.geometry import Geometry
from vqkv.layouts import Stream

ROOT = Path(__file__).parent.parent


class Ours(Peer):
    """Our own compressor in the place of a peer."""

    learns: ClassVar[bool] = False

    def __init__(self, compressor: KVCompressor) -> None:
        self.name, self.package = "ours", "vqkv"
        self.compressor = compressor

    def encode(self, layer: int, stream: Stream, states: torch.Tensor) -> Any:
        return self.compressor.encode(layer, stream, states)

    def decode(self, layer: int, stream: Stream, stored: Any) -> torch.Tensor:
        return self.compressor.decode(layer, stream, stored)

    def tensors(self, stored: Any) -> list[torch.Tensor]:
        return [stored.codes, stored.side]


class OursPre(Ours):
    rope: ClassVar[Literal["pre", "post"]] = "pre"


class OursPost(Ours):
    rope: ClassVar[Literal["pre", "post"]] = "post"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", max_position_embeddings=1024)


@pytest.fixture
def text(tmp_path: Path) -> Text:
    path = tmp_path / "text.txt"
    path.write_text(tiny_text(700))
    return read_text(path)


def bench(model: Any, folder: Path) -> Bench:
    settings = Settings(
        calibration_texts=(),
        calibration_tokens=400,
        tokens=256,
        skip=10,
        context=128,
        passages=2,
        passage_lengths=(40,),
        sinks=2,
    )
    exact = ExactLogits(model, folder / "exact")
    return Bench(model, tiny_tokenizer(), settings, exact, lambda what, done, total: None)


@pytest.mark.parametrize("kind", [OursPre, OursPost])
def test_figures_are_those_of_evaluate(
    model: Any, text: Text, kind: type[Ours], tmp_path: Path
) -> None:
    compressor = compressor_for(model, kind.rope, window=0, sinks=2)
    (row,) = bench(model, tmp_path).rows(kind(compressor), [], [text])
    expected = evaluate(
        model,
        tiny_tokenizer(),
        compressor,
        text,
        tokens=256,
        skip=10,
        context=128,
        passages=2,
        passage_lengths=(40,),
    ).to_dict()
    found = row.evaluation
    for name in ("kl", "perplexity", "perplexity_exact", "interval", "repeated_passage"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name
    assert found["bits_per_value"] == compressor.bits_per_value
    assert found.keys() == expected.keys()


def test_repeated_passages_are_of_the_first_text(model: Any, text: Text, tmp_path: Path) -> None:
    peer = OursPost(compressor_for(model, "post", window=0, sinks=2))
    first, second = bench(model, tmp_path).rows(peer, [], [text, text])
    assert set(first.evaluation["repeated_passage"]) == {40}
    assert second.evaluation["repeated_passage"] == {}


def test_sinks_do_not_reach_the_peer(model: Any) -> None:
    given = []

    class Watching(OursPost):
        def encode(self, layer: int, stream: Stream, states: torch.Tensor) -> Any:
            given.append(states)
            return super().encode(layer, stream, states)

    peer = Watching(compressor_for(model, "post", window=0))
    with opener(model, peer, 3)() as cache, torch.inference_mode():
        model(random_ids(1, 20), past_key_values=cache)
        with pytest.raises(CacheError, match="one forward per cache"):
            model(random_ids(1, 20), past_key_values=cache)
    for states in given:
        assert torch.equal(states[:, :, :3], states[:, :, 3:4].expand(-1, -1, 3, -1))


@pytest.mark.parametrize("kind", [FaissPQ, FaissRQ])
class TestFaiss:
    @pytest.fixture
    def peer(self, kind: type[FaissPeer]) -> FaissPeer:
        generator = torch.Generator().manual_seed(0)
        self.states = torch.randn(300, 2, 8, generator=generator)
        peer = kind()
        peer.fit(0, "keys", self.states)
        return peer

    def test_bytes(self, peer: FaissPeer) -> None:
        x = self.states[:50].transpose(0, 1)[None]
        (codes,) = peer.tensors(peer.encode(0, "keys", x))
        assert 8 * codes.nbytes == 2 * x.numel()
        codewords = {"faiss-pq-4d8b": 256 * 8, "faiss-rq-beam4": 2 * 256 * 8}
        assert peer.side_bytes() == 2 * 4 * codewords[peer.name]

    def test_each_head_has_its_own_codebook(self, peer: FaissPeer) -> None:
        """256 codewords of 300 vectors: most come back almost as they were, in their own head."""
        x = self.states.transpose(0, 1)[None]
        error = (peer.decode(0, "keys", peer.encode(0, "keys", x)) - x).norm() / x.norm()
        swapped = x.flip(1)
        other = (peer.decode(0, "keys", peer.encode(0, "keys", swapped)) - swapped).norm()
        assert error < 0.5 * other / x.norm()

    def test_zeroed_codes_are_read_as_zeros(self, peer: FaissPeer) -> None:
        x = self.states[:5].transpose(0, 1)[None]
        stored = peer.encode(0, "keys", x)
        for tensor in peer.tensors(stored):
            tensor.zero_()
        decoded = peer.decode(0, "keys", stored)
        assert torch.equal(decoded, decoded[:, :, :1].expand_as(decoded))


def test_faiss_learns_from_captured_states(model: Any, text: Text, tmp_path: Path) -> None:
    peer = FaissPQ()
    (row,) = bench(model, tmp_path).rows(peer, [text], [text])
    assert row.seconds_learn is not None
    assert row.evaluation["bits_per_value"] == 2
    assert 0 < row.evaluation["kl"] < 0.1
    assert len(peer.quantizers) == 4


BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(find_spec(module) is None, reason=f"no {name}"))
    for name, module in (("quanto", "optimum"), ("hqq", "hqq"))
]


@pytest.mark.parametrize("backend", BACKENDS)
class TestQuantizedCache:
    @pytest.mark.parametrize("bits", [2, 4])
    @pytest.mark.parametrize("size", [32, 64])
    def test_bytes_are_codes_and_two_half_scalars_a_group(
        self, model: Any, backend: Backend, bits: int, size: int
    ) -> None:
        for axes in ((0, 0), (OTHER_AXIS[backend], 0)):
            grouping = Grouping(*axes, size)
            peer = QuantizedCachePeer("", backend, bits, model.config, grouping)
            geometry = Geometry.from_model(model)
            values = 2 * 2 * 2 * 16 * 128
            assert 8 * stored_bytes(peer, geometry, 128) == values * (bits + 32 / size)
            assert min(coding_times(peer, geometry)) > 0

    def test_what_comes_back(self, model: Any, backend: Backend) -> None:
        """100 tokens are no whole number of groups."""
        x = torch.randn(1, 2, 100, 16, generator=torch.Generator().manual_seed(0))
        errors = {}
        for bits in (2, 4):
            peer = QuantizedCachePeer("", backend, bits, model.config)
            decoded = peer.decode(1, "values", peer.encode(1, "values", x)).float()
            assert decoded.shape == x.shape
            errors[bits] = float((decoded - x).norm() / x.norm())
        assert errors[4] < 0.15 < errors[2] < 0.7

    def test_zeroed_tensors_are_read_as_zeros(self, model: Any, backend: Backend) -> None:
        peer = QuantizedCachePeer("", backend, 4, model.config)
        stored = peer.encode(0, "keys", torch.randn(1, 2, 64, 16))
        for tensor in peer.tensors(stored):
            tensor.zero_()
        assert not peer.decode(0, "keys", stored).any()


def test_the_rosters_axes_are_those_found_best() -> None:
    found = json.loads((ROOT / "benchmarks/results/peers-axes.json").read_text(encoding="utf-8"))
    for backend, axes in BEST_AXES.items():
        mine = [row for row in found["rows"] if row["backend"] == backend]
        assert min(mine, key=lambda row: float(row["kl"]))["axes"] == list(axes)


def test_names_in_the_roster_are_the_peers_own(model: Any) -> None:
    for name, make in roster().items():
        if name.startswith("faiss"):
            assert make(model.config).name == name
