from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import make_geometry
from vqkv.compressor import FittedStream, KVCompressor, StateSource
from vqkv.errors import ModelError, NotFittedError, SchemeError, StateError
from vqkv.geometry import Geometry
from vqkv.layouts import Stream
from vqkv.scheme_files import load_scheme, preset_names, scheme_from_dict
from vqkv.states import States
from vqkv.transforms import Metric

TOKENS = 64
LEARNER = {"type": "kmeans", "iterations": 3}


class RandomStates(StateSource):
    """States of every stream, each another; remembers which were read."""

    def __init__(self, geometry: Geometry, tokens: int = TOKENS) -> None:
        self.geometry = geometry
        self.tokens = tokens
        self.read: list[tuple[int, Stream]] = []

    def tensor(self, layer: int, stream: Stream) -> torch.Tensor:
        generator = torch.Generator().manual_seed(2 * layer + (stream == "values"))
        shape = (self.tokens, self.geometry.kv_heads, self.geometry.head_dim)
        return torch.randn(shape, generator=generator) + layer

    def states(self, layer: int, stream: Stream) -> States:
        self.read.append((layer, stream))
        return States.of(self.tensor(layer, stream))

    def metric(self, layer: int, stream: Stream, kind: Metric) -> torch.Tensor:
        generator = torch.Generator().manual_seed(layer)
        head_dim = self.geometry.head_dim
        root = torch.randn(self.geometry.kv_heads, head_dim, head_dim, generator=generator)
        return root @ root.mT


def scheme(**changes: Any) -> Any:
    stream = {
        "transforms": [{"type": "center"}],
        "grouping": {"type": "energy_balanced", "dim": 4},
        "quantizer": {"type": "product", "code_bits": 3, "learner": LEARNER},
        **changes.pop("stream", {}),
    }
    return scheme_from_dict(
        {"name": "test", "keys": {"rope": "pre", **stream}, "values": stream, **changes}
    )


def fitted(geometry: Geometry, **changes: Any) -> KVCompressor:
    return KVCompressor(scheme(**changes), geometry).fit(RandomStates(geometry))


def same_output(one: KVCompressor, two: KVCompressor) -> bool:
    """Whether both give the same codes and reconstructions, bit for bit."""
    geometry = one.geometry
    x = torch.randn(
        2, geometry.kv_heads, 5, geometry.head_dim, generator=torch.Generator().manual_seed(9)
    )
    streams: tuple[Stream, ...] = ("keys", "values")
    for layer in geometry.compressed:
        for stream in streams:
            a, b = one.encode(layer, stream, x), two.encode(layer, stream, x)
            if not (torch.equal(a.codes, b.codes) and torch.equal(a.side, b.side)):
                return False
            if not torch.equal(one.decode(layer, stream, a, 2), two.decode(layer, stream, b, 2)):
                return False
    return True


# -- fitting -----------------------------------------------------------------------------------


def test_codebooks_that_no_calibration_fills_are_refused_before_it() -> None:
    # Four groups of a head share a codebook, so 64 samples bring 256 vectors.
    quantizer = {"type": "product", "code_bits": 9, "learner": LEARNER}
    stream = {"sharing": "head", "quantizer": quantizer}
    with pytest.raises(SchemeError, match="test: keys of layer 0: a codebook of 9 bits has 512"):
        KVCompressor(scheme(stream=stream, calibration={"samples": 64}), make_geometry())
    KVCompressor(scheme(stream=stream, calibration={"samples": 128}), make_geometry())


def test_every_stream_learns_from_its_own_states(geometry: Geometry) -> None:
    compressor = fitted(geometry)
    source = RandomStates(geometry)
    for (layer, stream), codec in compressor.codecs():
        expected = source.tensor(layer, stream).mean(0)
        mean = codec.state()["transforms.0.channels"].float()
        torch.testing.assert_close(mean, expected, rtol=2e-3, atol=2e-3)


def test_only_full_attention_layers_are_compressed() -> None:
    geometry = make_geometry(layers=3, compressed=(1,))
    source = RandomStates(geometry)
    compressor = KVCompressor(scheme(), geometry).fit(source)
    assert source.read == [(1, "keys"), (1, "values")]
    with pytest.raises(
        StateError, match=r"keys of layer 0 are not compressed, those of layers \[1"
    ):
        compressor.codec(0, "keys")


def test_progress_counts_every_stream(geometry: Geometry) -> None:
    told: list[tuple[int, int, str]] = []
    KVCompressor(scheme(), geometry).fit(
        RandomStates(geometry), progress=lambda *step: told.append(step)
    )
    names = ["0.keys", "0.values", "1.keys", "1.values"]
    assert told == [(i, 4, name) for i, name in enumerate(names, start=1)]


def test_fitting_is_deterministic_and_follows_the_seed(geometry: Geometry) -> None:
    one, two = fitted(geometry), fitted(geometry)
    assert one.identity() == two.identity() and same_output(one, two)
    other = KVCompressor(scheme(), geometry).fit(RandomStates(geometry), seed=1)
    assert other.identity() != one.identity()


@pytest.mark.parametrize("sharing", ["group", "model"])
def test_a_fit_that_was_cut_off_goes_on_where_it_stopped(geometry: Geometry, sharing: str) -> None:
    made = scheme(stream={"sharing": sharing})
    whole = KVCompressor(made, geometry).fit(RandomStates(geometry))
    checkpoint: dict[str, FittedStream] = {}

    def stop(done: int, total: int, name: str) -> None:
        if done >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        KVCompressor(made, geometry).fit(
            RandomStates(geometry), progress=stop, checkpoint=checkpoint
        )
    done = {tuple(name.split(".")) for name in checkpoint}
    assert len(done) == 2
    source = RandomStates(geometry)
    resumed = KVCompressor(made, geometry).fit(source, checkpoint=checkpoint)
    assert {(str(layer), stream) for layer, stream in source.read}.isdisjoint(done)
    assert len(source.read) == 2
    assert resumed.identity() == whole.identity() and same_output(resumed, whole)
    assert resumed.report() == whole.report()


def test_what_is_wrong_with_a_stream_names_it(geometry: Geometry) -> None:
    with pytest.raises(StateError, match="keys of layer 0: 8 codewords need at least as many"):
        KVCompressor(scheme(), geometry).fit(RandomStates(geometry, tokens=5))
    with pytest.raises(SchemeError, match=r"values of layer 0: grouping\.dim: 5 does not divide"):
        made = scheme()
        values = made.values.model_copy(
            update={"grouping": made.keys.grouping.model_copy(update={"dim": 5})}
        )
        KVCompressor(made.model_copy(update={"values": values}), geometry)


def test_schemes_that_cannot_code_the_model_are_refused() -> None:
    with pytest.raises(ModelError, match="no layer has full attention"):
        KVCompressor(scheme(), make_geometry(compressed=()))
    pairs = {"stream": {"grouping": {"type": "rope_pairs", "dim": 4}}}
    with pytest.raises(
        SchemeError, match=r"values of layer 0: grouping\.type: 'rope_pairs' groups"
    ):
        KVCompressor(scheme(**pairs), make_geometry())
    with pytest.raises(SchemeError, match=r"keys of layer 0: grouping\.type: 'rope_pairs' groups"):
        KVCompressor(scheme(**pairs), make_geometry(rope=None))


def test_overridden_layers_are_coded_as_they_say() -> None:
    geometry = make_geometry(layers=3, compressed=(0, 1, 2))
    compressor = fitted(
        geometry, layers=[{"layers": [-1], "keys": {"quantizer": {"code_bits": 1}}}]
    )
    bits = {key: codec.layout.segments[0].code_bits for key, codec in compressor.codecs()}
    assert bits == {
        (layer, stream): 1 if (layer, stream) == (2, "keys") else 3
        for layer in range(3)
        for stream in ("keys", "values")
    }
    # 4 codes of a head in 12 bits, or in 4, are 2 bytes or 1; so are 10 heads and 2.
    assert compressor.bytes_per_token == 2 * (5 * 2 + 1)
    assert compressor.bits_per_value == pytest.approx((5 * 1.0 + 0.5) / 6)


# -- codebooks that the model shares -----------------------------------------------------------


def test_the_model_shares_codebooks_but_not_what_each_layer_learns_for_itself() -> None:
    geometry = make_geometry(layers=3, compressed=(0, 1, 2))
    source = RandomStates(geometry)
    compressor = KVCompressor(scheme(stream={"sharing": "model"}), geometry).fit(source)
    codecs = dict(compressor.codecs())
    for stream in ("keys", "values"):
        books = {
            codecs[layer, stream].state()["segments.0.codewords"].data_ptr() for layer in range(3)
        }
        assert len(books) == 1
        means = [codecs[layer, stream].state()["transforms.0.channels"] for layer in range(3)]
        assert not torch.equal(means[0], means[1])
    assert codecs[0, "keys"].quantizers is not codecs[0, "values"].quantizers
    names = [f"{stream}.{name}" for stream, name, _ in compressor.tensors()]
    assert [name for name in names if "segments" in name] == [
        "0.keys.segments.0.codewords",
        "0.values.segments.0.codewords",
    ]
    assert len([name for name in names if "transforms" in name]) == 6
    assert compressor.health()["codebooks"] == 2


def test_million_keeps_as_much_as_its_repository() -> None:
    """64 subspaces of 256 codewords of 2 channels in fp16, for keys and for values."""
    everywhere = tuple(range(32))
    geometry = make_geometry(layers=32, compressed=everywhere, kv_heads=8, head_dim=128)
    assert KVCompressor(load_scheme("million-4"), geometry).planned_side_bytes() == 2 * 64 * 1024


def test_shared_codebooks_see_an_equal_share_of_every_layer(geometry: Geometry) -> None:
    # Layers lie apart by one, so codebooks of one layer alone would serve the other badly.
    stream = {
        "transforms": [],
        "sharing": "model",
        "grouping": {"type": "contiguous", "dim": 1},
        "quantizer": {"type": "product", "code_bits": 6, "learner": LEARNER},
    }
    compressor = fitted(geometry, stream=stream)
    books = compressor.codec(1, "keys").state()["segments.0.codewords"].float()
    assert books.mean() == pytest.approx(0.5, abs=0.25)


def test_layers_with_other_settings_do_not_share(geometry: Geometry) -> None:
    compressor = fitted(
        geometry,
        stream={"sharing": "model"},
        layers=[{"layers": [1], "keys": {"quantizer": {"code_bits": 2}}}],
    )
    shapes = {
        key: codec.state()["segments.0.codewords"].shape[2] for key, codec in compressor.codecs()
    }
    assert shapes == {(0, "keys"): 8, (0, "values"): 8, (1, "keys"): 4, (1, "values"): 8}
    names = [name for stream, name, _ in compressor.tensors() if name.startswith("segments")]
    assert len(names) == 3
    assert compressor.planned_side_bytes() == compressor.nbytes()


# -- coding ------------------------------------------------------------------------------------


def test_batches_are_coded_row_by_row(geometry: Geometry) -> None:
    compressor = fitted(geometry)
    x = torch.randn(3, 2, 7, 16, generator=torch.Generator().manual_seed(0))
    encoded = compressor.encode(1, "values", x)
    y = compressor.decode(1, "values", encoded, batch=3)
    assert y.shape == x.shape and y.dtype == torch.float32
    for row in range(3):
        alone = compressor.encode(1, "values", x[row : row + 1])
        assert torch.equal(alone.codes, encoded.codes[7 * row : 7 * (row + 1)])
        assert torch.equal(compressor.decode(1, "values", alone), y[row : row + 1])


def test_no_tokens(geometry: Geometry) -> None:
    compressor = fitted(geometry)
    encoded = compressor.encode(0, "keys", torch.zeros(3, 2, 0, 16))
    assert compressor.decode(0, "keys", encoded, batch=3).shape == (3, 2, 0, 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_states_of_any_type(geometry: Geometry, dtype: torch.dtype) -> None:
    compressor = fitted(geometry)
    x = torch.randn(1, 2, 5, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes = compressor.encode(0, "keys", x).codes
    assert torch.equal(codes, compressor.encode(0, "keys", x.float()).codes)


@pytest.mark.parametrize(
    "use",
    [
        lambda c: c.encode(0, "keys", torch.zeros(1, 2, 1, 16)),
        lambda c: c.codec(0, "keys"),
    ],
)
def test_not_fitted(geometry: Geometry, use: Callable[[KVCompressor], Any]) -> None:
    with pytest.raises(NotFittedError, match="scheme 'test' learns from data: calibrate it first"):
        use(KVCompressor(scheme(), geometry))


@pytest.mark.parametrize("name", preset_names())
def test_data_free_presets_need_no_fit(name: str) -> None:
    geometry = make_geometry(head_dim=64, layers=4, compressed=(0, 1, 2, 3))
    made = load_scheme(name)
    compressor = KVCompressor(made, geometry)
    free = name.startswith(
        ("scalar", "turboquant", "qjl", "kivi", "quantspec", "nsn", "polarquant")
    )
    assert compressor.fitted == made.data_free == free
    if made.data_free:
        x = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0))
        y = compressor.decode(0, "keys", compressor.encode(0, "keys", x))
        if name.startswith("scalar"):
            bits = made.keys.quantizer.bits()  # type: ignore[union-attr]
            step = (x.amax(-1) - x.amin(-1)) / 2**bits
            assert ((x - y).abs().amax(-1) <= 0.51 * step).all()
        else:
            assert (x - y).square().mean() < x.square().mean()
        source = RandomStates(geometry)
        before = compressor.identity()
        assert compressor.fit(source).identity() == before and source.read == []


# -- figures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", ["group", "head", "layer", "subspace", "model"])
def test_side_bytes_are_those_of_the_tensors(geometry: Geometry, sharing: str) -> None:
    compressor = fitted(geometry, stream={"sharing": sharing})
    sides = compressor.side_bytes()
    tensors = {f"{stream}.{name}": tensor for stream, name, tensor in compressor.tensors()}
    assert sides["total"] == sum(tensor.nbytes for tensor in tensors.values())
    books = {"group": 4 * 8, "head": 4 * 2, "layer": 4, "subspace": 2 * 4, "model": 2}[sharing]
    assert sides["codebooks"] == books * 8 * 4 * 2
    assert sides["transforms"] == 4 * 2 * 16 * 2
    assert sides["orders"] == 4 * 2 * 16 * 8
    assert compressor.nbytes() == sides["total"] == compressor.planned_side_bytes()
    assert KVCompressor(compressor.scheme, geometry).planned_side_bytes() == sides["total"]


def test_effective_bits_count_exact_tokens_and_side_bytes(geometry: Geometry) -> None:
    compressor = fitted(geometry, residency={"sinks": 4, "window": 10})
    values = 2 * 2 * 2 * 16  # streams, layers, heads, channels: of a token
    side = 8 * compressor.nbytes()
    position = 32 / values  # of a token; the keys are pre-RoPE
    assert compressor.effective_bits_per_value(20) == 16 + position + side / (20 * values)
    # Of 100 tokens one page of 64 is coded; 4 of them are kept exact as well.
    coded = 64 * compressor.bytes_per_token * 8
    expected = (coded + (36 + 4) * 16 * values + side) / (100 * values)
    assert compressor.effective_bits_per_value(100) == pytest.approx(expected + position)
    long = compressor.effective_bits_per_value(10**8)
    assert long == pytest.approx(compressor.bits_per_value + position, rel=1e-4)


def test_report_and_repr(geometry: Geometry) -> None:
    compressor = fitted(geometry)
    report = compressor.report()
    assert report["bits_per_value"] == compressor.bits_per_value == 1.0
    assert report["side_bytes"]["total"] == compressor.nbytes()
    assert len(report["streams"]) == 4
    health = report["health"]
    assert health["codebooks"] == 4
    assert 0 < health["entropy_min"] <= health["entropy_mean"] <= 3
    gains = [float(h.last_gain or 0) for _, codec in compressor.codecs() for h in codec.health]
    assert health["last_gain_mean"] == pytest.approx(sum(gains) / 4)
    assert health["last_gain_max"] == max(gains)
    assert repr(compressor) == "KVCompressor('test', 2 layers, 1 bits per value, fitted)"
    assert "not fitted" in repr(KVCompressor(scheme(), geometry))


def test_identity_follows_scheme_and_codebooks(geometry: Geometry) -> None:
    compressor = fitted(geometry)
    before = compressor.identity()
    _, name, tensor = next(iter(compressor.tensors()))
    tensor.view(torch.int16).flatten()[0] ^= 1
    assert compressor.identity() != before, name
    assert fitted(geometry, residency={"sinks": 5}).identity() != before


def test_other_residency_same_codecs(geometry: Geometry) -> None:
    compressor = fitted(geometry)
    other = compressor.with_residency(sinks=1, window=7)
    assert (other.scheme.residency.sinks, other.scheme.residency.window) == (1, 7)
    assert compressor.scheme.residency.sinks == 4
    assert dict(other.codecs()) == dict(compressor.codecs())


# -- tensors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", ["group", "subspace", "model"])
def test_tensors_go_out_and_in(geometry: Geometry, sharing: str) -> None:
    compressor = fitted(geometry, stream={"sharing": sharing})
    tensors = {f"{stream}.{name}": tensor for stream, name, tensor in compressor.tensors()}
    loaded = KVCompressor(compressor.scheme, geometry).load_tensors(tensors, {})
    assert same_output(loaded, compressor)
    if sharing != "group":
        assert loaded.codec(1, "keys").quantizers is loaded.codec(0, "keys").quantizers


def test_tensors_that_do_not_fit_are_refused(geometry: Geometry) -> None:
    compressor = fitted(geometry)
    tensors = {f"{stream}.{name}": tensor for stream, name, tensor in compressor.tensors()}
    empty = KVCompressor(compressor.scheme, geometry)
    with pytest.raises(StateError, match=r"unknown tensors: \['2\.keys\.bias'\]"):
        empty.load_tensors({**tensors, "2.keys.bias": torch.zeros(1)}, {})
    without = {k: v for k, v in tensors.items() if k != "1.keys.segments.0.codewords"}
    with pytest.raises(StateError, match="keys of layer 1: state holds 'codewords' alone, given"):
        empty.load_tensors(without, {})
    assert not empty.fitted


class WeighedStates(RandomStates):
    """Also says what errors cost."""

    def metric(self, layer: int, stream: Stream, kind: Any) -> torch.Tensor:
        dim = self.geometry.head_dim
        root = torch.randn(self.geometry.kv_heads, dim, dim, dtype=torch.float64)
        return root @ root.mT + torch.eye(dim, dtype=torch.float64)

    def across_heads(self, layer: int, stream: Stream, together: int) -> torch.Tensor:
        sets, dim = self.geometry.kv_heads // together, self.geometry.head_dim
        root = torch.randn(sets, together * dim, together * dim, dtype=torch.float64)
        return (root @ root.mT).view(sets, together, dim, together, dim)

    def gradients(self, layer: int, stream: Stream) -> States:
        x = self.states(layer, stream)
        return x.map(torch.randn_like)


@pytest.mark.parametrize("name", ["fast-2bit", "fast-1bit", "spectral-2"])
def test_presets_learned_in_a_metric_come_back_from_their_artefact(
    name: str, tmp_path: Path
) -> None:
    geometry = make_geometry()
    states = WeighedStates(geometry, tokens=400)
    compressor = KVCompressor(load_scheme(name), geometry).fit(states)
    assert compressor.planned_side_bytes() == compressor.nbytes()
    compressor.save_pretrained(tmp_path / "artefact")
    again = KVCompressor.from_pretrained(tmp_path / "artefact")
    x = states.tensor(0, "keys").transpose(0, 1)[None]
    assert torch.equal(again.encode(0, "keys", x).codes, compressor.encode(0, "keys", x).codes)
    if name != "spectral-2":
        sources = [compressor.decode(0, "keys", compressor.encode(0, "keys", x))]
        found, expected = (c.encode(0, "values", x, sources) for c in (again, compressor))
        assert torch.equal(found.codes, expected.codes)
