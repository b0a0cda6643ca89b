"""Rates of streams: steps, schemes with many of them, and files that say just what differs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_models import tiny_model
from vqkv.compressor import KVCompressor, StreamKey
from vqkv.errors import SchemeError
from vqkv.geometry import Geometry
from vqkv.scheme import STREAMS
from vqkv.scheme_files import load_scheme
from vqkv.tuning.files import scheme_file
from vqkv.tuning.rates import (
    ProductStep,
    Step,
    TrellisStep,
    eighths,
    ladder,
    whole_bytes,
    with_steps,
)


@pytest.fixture
def geometry() -> Geometry:
    return Geometry.from_model(tiny_model("llama"))


def keys_of(geometry: Geometry) -> list[StreamKey]:
    return [(layer, stream) for layer in geometry.compressed for stream in STREAMS]


def test_steps_rise_and_the_largest_dim_stands_for_a_rate() -> None:
    steps = ladder((2, 4, 8), (6, 8, 10))
    assert [step.rate for step in steps] == [0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5]
    assert steps[3] == ProductStep(4, 6) and ladder((4, 2), (4, 8))[1] == ProductStep(4, 8)


def test_trellis_codes_come_in_eighths_of_a_bit() -> None:
    steps = eighths(0.5, 1)
    assert [step.rate for step in steps] == [0.5, 0.625, 0.75, 0.875, 1]
    assert [step.rate for step in whole_bytes(steps, 32)] == [0.5, 0.75, 1]


def test_no_byte_is_left_half_used() -> None:
    steps = ladder((2, 4, 8), (5, 6, 8, 9))
    assert whole_bytes(steps, 16) == (
        ProductStep(8, 8),
        ProductStep(4, 6),
        ProductStep(4, 8),
        ProductStep(2, 5),
        ProductStep(2, 6),
        ProductStep(2, 8),
        ProductStep(2, 9),
    )
    assert whole_bytes(steps, 12) == (ProductStep(4, 8), ProductStep(2, 8))


@pytest.mark.parametrize(
    "preset, usual, low, high",
    [
        ("fast-2bit", ProductStep(4, 8), ProductStep(8, 8), ProductStep(2, 8)),
        ("recommended-2bit", TrellisStep(2.25), TrellisStep(1), TrellisStep(3.5)),
    ],
)
def test_each_stream_has_its_step(
    preset: str, usual: Step, low: Step, high: Step, geometry: Geometry, tmp_path: Path
) -> None:
    base = load_scheme(preset)
    steps = dict.fromkeys(keys_of(geometry), usual)
    steps[geometry.compressed[-1], "values"] = low
    steps[geometry.compressed[0], "keys"] = high
    scheme = with_steps(base, "mixed", steps, geometry)
    layouts = {key: codec.layout for key, codec in KVCompressor(scheme, geometry).codecs()}
    assert {key: layout.bits_per_value for key, layout in layouts.items()} == {
        key: step.rate for key, step in steps.items()
    }
    file = tmp_path / "scheme.yaml"
    file.write_text(scheme_file(scheme, preset, ["found"]))
    assert load_scheme(file) == scheme
    assert "learner" not in file.read_text()  # nothing that the preset says already
    rate = sum(step.rate for step in steps.values()) / len(steps)
    assert scheme.description == f"{preset} at {rate:.4g} bits per value."


def test_sources_before_the_first_compressed_layer_are_left_out(tmp_path: Path) -> None:
    hybrid = Geometry.from_model(tiny_model("gemma3"))  # one of its three layers grows
    steps = dict.fromkeys(keys_of(hybrid), TrellisStep(2.5))
    scheme = with_steps(load_scheme("recommended-2bit"), "cut", steps, hybrid)
    sources = {key: KVCompressor(scheme, hybrid).sources(*key) for key in steps}
    assert sources == {(1, "keys"): [], (1, "values"): [(1, "keys")]}
    file = tmp_path / "scheme.yaml"
    file.write_text(scheme_file(scheme, "recommended-2bit", []))
    assert load_scheme(file) == scheme


def test_a_uniform_step_needs_no_overrides_but_those_of_the_preset(geometry: Geometry) -> None:
    base = load_scheme("fast-2bit")
    scheme = with_steps(
        base, base.name, dict.fromkeys(keys_of(geometry), ProductStep(4, 8)), geometry
    )
    assert scheme.fingerprint() == base.fingerprint()


def test_other_quantizers_are_refused(geometry: Geometry) -> None:
    for step in (ProductStep(4, 8), TrellisStep(2)):
        steps = dict.fromkeys(keys_of(geometry), step)
        with pytest.raises(
            SchemeError,
            match=f"rates of a {step.kind} quantizer for all channels do not fit residual",
        ):
            with_steps(load_scheme("rvq-2.875"), "x", steps, geometry)
