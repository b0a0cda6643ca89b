from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import make_geometry
from vqkv.codec import Codec
from vqkv.compressor import KVCompressor
from vqkv.layouts import PAGE_TOKENS, Layout, Segment, SideField, coded_tokens
from vqkv.quantizers.commutative import Commutative
from vqkv.quantizers.trellis import Trellis
from vqkv.rotation import rope_pairs
from vqkv.scheme import KeysConfig, StreamConfig
from vqkv.scheme_files import load_scheme, preset_names
from vqkv.states import States

TOKENS = 16


def stored(codec: Codec) -> int:
    """Bytes of real tensors per token."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, codec.heads, codec.head_dim, generator=generator)
    codec.fit(States.of(x), samples=TOKENS)
    nbytes = codec.encode(x).nbytes
    assert nbytes % TOKENS == 0
    return nbytes // TOKENS


def give_codewords(codec: Codec) -> None:
    """Codebooks of the right shape, so that coding runs without learning them first."""
    states = States.of(torch.randn(50, codec.heads, codec.head_dim))
    left = codec.fit_predictor(states, [states for _ in codec.layout.sources])
    metric = torch.eye(codec.head_dim).expand(codec.heads, -1, -1)
    across, together = None, codec.coupled_heads
    if together is not None:
        sets, channels = codec.heads // together, together * codec.head_dim
        across = torch.eye(channels).expand(sets, -1, -1)
        across = across.view(sets, *2 * (together, codec.head_dim))
    codec.fit_space(left, None if codec.metric is None else metric, across)
    for quantizer, segment in zip(codec.quantizers, codec.layout.segments, strict=True):
        if quantizer.config.data_free:
            quantizer.prepare(segment.books, segment.dim)
            continue
        if isinstance(quantizer, Trellis):
            quantizer._share_out(torch.ones(segment.books, segment.dim))
            quantizer.table_ = torch.zeros(2**quantizer.config.memory, 2, dtype=torch.float16)
            continue
        commutative = isinstance(quantizer, Commutative)
        size = int(getattr(quantizer.config, "size", segment.codewords))
        shape = (segment.books, segment.stages, size, segment.dim)
        name = "units" if commutative else "codewords"
        quantizer.load_state({name: torch.zeros(shape, dtype=torch.float16)})


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("name", preset_names())
def test_formula_and_tensors_agree_for_presets(name: str, head_dim: int) -> None:
    heads = {"head_dim": head_dim, "kv_heads": 3, "query_heads": 3}
    geometry = make_geometry(**heads, layers=4, compressed=(0, 1, 2, 3))
    x = torch.randn(64, 3, head_dim, generator=torch.Generator().manual_seed(0))
    for _, codec in KVCompressor(load_scheme(name), geometry).codecs():
        sources = [x for _ in codec.layout.sources]
        if not codec.config.data_free:
            give_codewords(codec)
        encoded = codec.encode(x, sources)
        assert encoded.nbytes == 64 * codec.layout.bytes_per_token
        assert encoded.side.shape == (64, codec.layout.side_count)
        values = 3 * head_dim
        assert codec.layout.bits_per_value == pytest.approx(8 * encoded.nbytes / 64 / values)


@st.composite
def streams(draw: st.DrawFn) -> tuple[StreamConfig, int, int]:
    heads = draw(st.integers(1, 4))
    dim = draw(st.integers(1, 5))
    parts = draw(st.integers(1, 3))
    head_dim = dim * parts * draw(st.integers(1, 4))
    across = draw(st.booleans())
    sharing = draw(
        st.sampled_from(["group", "layer", "model"] + ["head", "subspace"] * (not across))
    )

    def quantizer() -> dict[str, Any]:
        kind = draw(st.sampled_from(["product", "residual", "identity"]))
        if kind == "identity":
            return {"type": "identity", "dtype": draw(st.sampled_from(["float16", "float32"]))}
        learner = {"type": "kmeans", "iterations": 1}
        if kind == "product":
            bits = draw(st.integers(0, 4))
            return {"type": "product", "code_bits": bits, "learner": learner}
        bits, depth = draw(st.integers(1, 4)), draw(st.integers(1, 3))
        return {"type": "residual", "depth": depth, "code_bits": bits, "learner": learner}

    scopes = st.sampled_from(["head", "layer"])
    stats = st.sampled_from(["std", "minmax", "l2"])
    scale = {"type": "token_scale", "stat": draw(stats), "scope": draw(scopes)}
    config = StreamConfig.model_validate(
        {
            "transforms": draw(st.sampled_from([[], [scale], [{"type": "center"}, scale]])),
            "grouping": {"type": "across_heads" if across else "contiguous", "dim": dim},
            "sharing": sharing,
            "segments": [{"share": 1 / parts, "quantizer": quantizer()} for _ in range(parts)],
        }
    )
    return config, heads, head_dim


@settings(max_examples=60, deadline=None)
@given(streams())
def test_formula_and_tensors_agree(case: tuple[StreamConfig, int, int]) -> None:
    config, heads, head_dim = case
    codec = Codec(config, heads, head_dim)
    assert stored(codec) == codec.layout.bytes_per_token
    side = sum(tensor.nbytes for tensor in codec.state().values())
    assert side == codec.planned_bytes()


@pytest.mark.parametrize("bits", range(17))
def test_formula_and_tensors_agree_at_every_width(bits: int) -> None:
    # 3 codes in each of 2 heads: whole bytes only at some widths.
    config = StreamConfig.model_validate(
        {
            "grouping": {"type": "contiguous", "dim": 2},
            "quantizer": {"type": "product", "code_bits": bits},
        }
    )
    codec = Codec(config, 2, 6)
    give_codewords(codec)
    encoded = codec.encode(torch.ones(4, 2, 6))
    assert encoded.codes.shape == (4, 2, -(-3 * bits // 8))
    assert encoded.nbytes == 4 * codec.layout.bytes_per_token


def test_padding_and_side_count_in_full() -> None:
    segment = Segment(units=3, groups=5, dim=2, stages=2, code_bits=3, books=1)
    layout = Layout(3, 10, (segment,), side=(SideField("scale", 3), SideField("flag", 1, bits=1)))
    assert (segment.subvectors, segment.codewords, segment.codes_per_unit) == (15, 8, 10)
    assert segment.bytes_per_unit == 4  # 30 bits
    assert layout.side_count == 4
    assert layout.bytes_per_token == 3 * 4 + 7  # 49 bits of side
    assert layout.bits_per_value == 8 * 19 / 30


def test_zero_bits_store_nothing() -> None:
    empty = Segment(units=2, groups=4, dim=2, stages=1, code_bits=0, books=8)
    assert (empty.codewords, empty.bytes_per_unit) == (1, 0)
    assert Layout(2, 8, (empty,)).bits_per_value == 0


@pytest.mark.parametrize(("codewords", "bits"), [(1, 0), (2, 1), (3, 2), (256, 8), (257, 9)])
def test_layout_of_a_bare_codebook(codewords: int, bits: int) -> None:
    layout = Layout.of_codebook(3, 2, codewords, 4)
    (segment,) = layout.segments
    assert (segment.subvectors, segment.stages, segment.dim, segment.code_bits) == (3, 2, 4, bits)
    assert hash(layout) == hash(Layout.of_codebook(3, 2, codewords, 4))


@given(tokens=st.integers(0, 10**6), window=st.integers(0, 10**6))
def test_pages_are_born_full_and_the_tail_holds_the_window(tokens: int, window: int) -> None:
    coded = coded_tokens(tokens, window)
    assert coded >= 0 and coded % PAGE_TOKENS == 0
    tail = tokens - coded
    assert min(tokens, window) <= tail < window + PAGE_TOKENS


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("name", "bits"), [("fast-2bit", 2), ("fast-1bit", 1)])
def test_fast_schemes_are_read_by_one_look_up_per_byte(name: str, bits: int, head_dim: int) -> None:
    geometry = make_geometry(head_dim=head_dim, kv_heads=2, query_heads=4)
    for (_, stream), codec in KVCompressor(load_scheme(name), geometry).codecs():
        layout = codec.layout
        (segment,) = layout.segments
        assert (segment.stages, segment.code_bits) == (1, 8)
        assert layout.head_local and layout.side_count == 0
        assert layout.bytes_per_unit == head_dim * bits // 8
        assert layout.pairs_whole or stream == "values"
        codebook_bytes = 2 * segment.groups * segment.codewords * segment.dim
        assert codebook_bytes <= 512 * head_dim  # 64 KiB of a head at D = 128


@pytest.mark.parametrize(
    ("transforms", "grouping", "whole"),
    [
        ([], {"type": "rope_pairs", "dim": 4}, True),
        ([{"type": "center"}], {"type": "rope_pairs", "dim": 4}, True),
        ([{"type": "pair_metric", "dim": 4}], {"type": "contiguous", "dim": 4}, True),
        ([{"type": "pair_metric", "dim": 4}], {"type": "contiguous", "dim": 8}, True),
        ([{"type": "pair_metric", "dim": 8}], {"type": "contiguous", "dim": 4}, False),
        ([{"type": "pair_metric", "dim": 4}], {"type": "rope_pairs", "dim": 4}, False),
        ([{"type": "spectral"}], {"type": "strided", "dim": 4}, False),
        ([{"type": "spectral"}], {"type": "whole"}, True),
    ],
)
def test_pairs_are_whole_where_no_code_holds_a_part_of_one(
    transforms: list[dict[str, Any]], grouping: dict[str, Any], whole: bool
) -> None:
    quantizer = {"type": "product", "code_bits": 2}
    config = KeysConfig.model_validate(
        {"rope": "pre", "transforms": transforms, "grouping": grouping, "quantizer": quantizer}
    )
    assert Codec(config, 2, 16, rope_pairs("half", 16)).layout.pairs_whole is whole
