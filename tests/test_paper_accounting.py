"""Rates and bytes as the papers count them, on Llama-3.1-8B: 32 layers, 8 KV heads, D = 128.

What presets store, padding and every scale included, is in `test_scheme_files.py`; papers often
leave some of that out. Figures come from layouts and planned sizes, which other tests hold to real
tensors.
"""

from __future__ import annotations

from functools import cache

import pytest

from tests.conftest import make_geometry
from vqkv.compressor import KVCompressor
from vqkv.geometry import RopeForm
from vqkv.layouts import Layout, Stream
from vqkv.scheme import STREAMS
from vqkv.scheme_files import load_scheme

EXACT_BITS = 16


@cache
def compressor(preset: str, layers: int = 32) -> KVCompressor:
    geometry = make_geometry(
        layers=layers,
        compressed=tuple(range(layers)),
        kv_heads=8,
        query_heads=32,
        head_dim=128,
        rope=RopeForm("default", 500_000.0, 128, "half"),
    )
    return KVCompressor(load_scheme(preset), geometry)


def layouts(preset: str, stream: Stream, layers: int = 32) -> list[Layout]:
    codecs = compressor(preset, layers).codecs()
    return [codec.layout for (_, of), codec in codecs if of == stream]


def code_bits(layout: Layout) -> float:
    """Bits of codes per value: neither scales nor padding to whole bytes."""
    codes = sum(s.subvectors * s.stages * s.code_bits for s in layout.segments)
    return codes / (layout.heads * layout.head_dim)


def scale_bits(layout: Layout) -> float:
    """Bits per value of what stands beside the codes."""
    side = sum(field.count * field.bits for field in layout.side)
    return side / (layout.heads * layout.head_dim)


def mean_code_bits(preset: str) -> float:
    return sum(code_bits(layouts(preset, stream)[-1]) for stream in STREAMS) / len(STREAMS)


def saved(bits: float) -> float:
    """Per cent of the 16-bit cache."""
    return 100 * (1 - bits / EXACT_BITS)


def codebook_megabytes(preset: str) -> float:
    return compressor(preset).planned_side_bytes() / 1e6


def test_the_exact_cache_of_this_geometry() -> None:
    assert 2 * compressor("cq-4c8b").values_per_token == 131_072  # bytes of a token


def test_vqkv() -> None:
    """`1 − (N_k log2 S_k + N_v log2 S_v) / (16 (D_k + D_v))` is 82.8 %, without scales."""
    keys, values = layouts("vqkv-2.75", "keys")[0], layouts("vqkv-2.75", "values")[0]
    assert [(s.stages, s.codewords) for s in keys.segments] == [(56, 1024)]
    assert [(s.stages, s.codewords) for s in values.segments] == [(16, 512)]
    assert (code_bits(keys), code_bits(values)) == (4.375, 1.125)
    assert scale_bits(keys) == scale_bits(values) == 0
    assert mean_code_bits("vqkv-2.75") == 2.75
    assert round(saved(2.75), 1) == 82.8
    assert compressor("vqkv-2.75").bits_per_value == 2.75  # stored: no padding at this dim
    assert round(codebook_megabytes("vqkv-2.75")) == 537


def test_rvq() -> None:
    """`R log2 C / 32 + 16 / 128` is 2.875 bits, the scale included, and 5.57 times smaller."""
    for stream in STREAMS:
        layout = layouts("rvq-2.875", stream)[0]
        assert (code_bits(layout), scale_bits(layout)) == (2.75, 0.125)
    assert compressor("rvq-2.875").bits_per_value == 2.875
    assert round(EXACT_BITS / 2.875, 2) == 5.57
    assert round(codebook_megabytes("rvq-2.875")) == 67


@pytest.mark.parametrize(
    ("preset", "stages", "key_bits", "paper", "stored"),
    [("commvq-2", 21, 1.96875, 87.5, 87.4), ("commvq-1", 11, 1.03125, 93.6, 93.5)],
)
def test_commvq(preset: str, stages: int, key_bits: float, paper: float, stored: float) -> None:
    """Keys `R log2 64 / 64` bits, one norm a token; a head's codes are stored in whole bytes."""
    keys, values = layouts(preset, "keys")[0], layouts(preset, "values")[0]
    assert [(s.stages, s.code_bits, s.groups) for s in keys.segments] == [(stages, 12, 1)]
    assert code_bits(keys) == key_bits
    assert scale_bits(keys) == scale_bits(values) == 16 / 1024
    assert round(saved(mean_code_bits(preset) + 16 / 1024), 1) == paper
    assert round(saved(compressor(preset).bits_per_value), 1) == stored


def test_aqua_kv() -> None:
    """`(4 + 27 · 2) / 28 + 16 / 1024` on the 28 layers of Llama-3.2-3B: 2.09 bits."""
    found = compressor("aquakv-2", layers=28)
    assert [code_bits(layout) for layout in layouts("aquakv-2", "keys", 28)] == [4] + 27 * [2]
    assert found.bits_per_value == pytest.approx((4 + 27 * 2) / 28 + 16 / 1024)
    assert round(found.bits_per_value, 2) == 2.09
    predictors = 31 * 2 * (1025 + 2049) * 1024
    grids = compressor("aquakv-2").planned_side_bytes() - predictors
    assert 0 < grids < 0.001 * predictors
    assert round(predictors / 1e6) == 195


@pytest.mark.parametrize(
    ("preset", "channels", "bits", "rate", "megabytes"),
    [
        ("cq-2c8b", 2, 8, 4.0, 33.6),
        ("cq-4c8b", 4, 8, 2.0, 33.6),
        ("cq-8c8b", 8, 8, 1.0, 33.6),
        ("cq-8c10b", 8, 10, 1.25, 134.2),
    ],
)
def test_cq(preset: str, channels: int, bits: int, rate: float, megabytes: float) -> None:
    """`b / c` for c coupled channels of a b-bit code; a codebook for each group of each head."""
    layout = layouts(preset, "keys")[0]
    assert [(s.dim, s.code_bits, s.books) for s in layout.segments] == [
        (channels, bits, 8 * 128 // channels)
    ]
    assert compressor(preset).bits_per_value == mean_code_bits(preset) == rate
    assert round(codebook_megabytes(preset), 1) == megabytes


@pytest.mark.parametrize(("preset", "bits"), [("kivi-2", 2), ("kivi-4", 4)])
def test_kivi(preset: str, bits: int) -> None:
    """A 16-bit scale and zero for 32 values: `b + 32 / 32`, keys over tokens, values channels."""
    keys, values = layouts(preset, "keys")[0], layouts(preset, "values")[0]
    assert keys.token_group == 32
    for layout in (keys, values):
        assert (code_bits(layout), scale_bits(layout)) == (bits, 1)
    assert compressor(preset).bits_per_value == bits + 1


@pytest.mark.parametrize(("preset", "bits"), [("kvquant-2", 2), ("kvquant-3", 3)])
def test_kvquant(preset: str, bits: int) -> None:
    """1 % of a token's 1,024 channels at 32 bits each: 2.32, about what others count for it."""
    keys, values = layouts(preset, "keys")[0], layouts(preset, "values")[0]
    assert code_bits(keys) == code_bits(values) == bits
    assert scale_bits(keys) == 10 * 32 / 1024
    assert scale_bits(values) == 10 * 32 / 1024 + 16 / 1024
    assert compressor(preset).bits_per_value == pytest.approx(bits + 0.33, abs=0.02)


@pytest.mark.parametrize(("preset", "bits"), [("turboquant-2.5", 2.5), ("turboquant-3.5", 3.5)])
def test_turboquant(preset: str, bits: float) -> None:
    """The paper's rate is that of the codes; a head vector's scale is stored beside them."""
    assert mean_code_bits(preset) == bits
    assert {scale_bits(layout) for layout in layouts(preset, "keys")} == {16 / 128}
    assert compressor(preset).bits_per_value == bits + 16 / 128
