"""The example plugin: its own tests, its scheme, and its names where they belong."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from tests.cache.compressors import ModelStates
from tests.tiny_models import tiny_model
from vqkv.codebooks import LEARNERS
from vqkv.compressor import KVCompressor
from vqkv.geometry import Geometry
from vqkv.quantizers import QUANTIZERS
from vqkv.scheme import merge
from vqkv.scheme_files import load_scheme, scheme_from_dict, scheme_schema
from vqkv.testing import check_cache

EXAMPLE = Path(__file__).parent.parent / "examples" / "plugin"


@pytest.mark.parametrize("name", ["test_quantizer", "test_learner"])
def test_its_own_tests_pass(name: str) -> None:
    runpy.run_path(str(EXAMPLE / "tests" / "test_conformance.py"))[name]()


def test_its_names_come_from_its_entry_points() -> None:
    assert QUANTIZERS.sources()["sign_mean"] == [
        "vqkv-example (vqkv_example.sign_mean:SignMeanQuantizer)"
    ]
    assert LEARNERS.sources()["random_samples"] == [
        "vqkv-example (vqkv_example.random_samples:RandomSamples)"
    ]


def test_its_names_are_in_the_schema() -> None:
    definitions = scheme_schema()["$defs"]
    for group, config in (
        ("vqkv.quantizers", "SignMeanConfig"),
        ("vqkv.learners", "RandomSamplesConfig"),
    ):
        assert {"$ref": f"#/$defs/{config}"} in definitions[group]["anyOf"]
    assert definitions["SignMeanConfig"]["properties"]["type"]["const"] == "sign_mean"


def test_its_scheme_runs_in_a_cache_and_survives_saving(tmp_path: Path) -> None:
    model = tiny_model("llama", max_position_embeddings=1024)
    data = load_scheme(EXAMPLE / "sign-mean.yaml").to_dict()
    # 200 tokens of states to learn from are fewer than the 256 codewords of its values.
    scheme = scheme_from_dict(merge(data, {"values": {"quantizer": {"code_bits": 6}}}))
    geometry = Geometry.from_model(model)
    compressor = KVCompressor(scheme, geometry).fit(ModelStates(model, geometry, "pre"))
    assert compressor.bits_per_value == (1 + 1.5) / 2
    check_cache(compressor, model)
    loaded = KVCompressor.from_pretrained(compressor.save_pretrained(tmp_path / "art"))
    assert loaded.identity() == compressor.identity()
    assert json.loads((tmp_path / "art" / "config.json").read_text())["scheme"] == scheme.to_dict()
