"""Every built-in member passes the public conformance check of its kind; a broken one does not.

A new method gets the whole contract tested by adding one row.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tiny_models import tiny_model
from vqkv.codebooks import LEARNERS
from vqkv.compressor import KVCompressor
from vqkv.geometry import Geometry
from vqkv.groupings import GROUPINGS, ChannelStats, Contiguous
from vqkv.predictors import PREDICTORS
from vqkv.quantizers import QUANTIZERS
from vqkv.quantizers.product import ProductQuantizer
from vqkv.scheme_files import load_scheme
from vqkv.testing import (
    check_cache,
    check_grouping,
    check_learner,
    check_predictor,
    check_quantizer,
    check_transform,
)
from vqkv.transforms import TRANSFORMS

KEYS, VALUES = ({"stream": stream, "back": 1} for stream in ("keys", "values"))
QUANTIZER_SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("product", {"code_bits": 4}),
    ("product", {"code_bits": 3, "dim": 1, "learner": {"type": "uniform"}}),
    ("residual", {"depth": 3, "code_bits": 3}),
    ("residual", {"depth": 2, "code_bits": 3, "learner": {"type": "ema", "steps": 5}}),
    ("residual", {"rate": 1.5, "code_bits": 3, "beam": 3, "refine": 2}),
    ("identity", {"dtype": "bfloat16"}),
    ("sign_sketch", {"rate": 4}),
    ("rope_commutative", {"rate": 4, "size": 8}),
    ("e8p", {"dim": 8}),
    ("nested", {"dim": 1, "depth": 2, "code_bits": 4}),
    ("joint_heads", {"code_bits": 4}),
    ("joint_product", {"code_bits": 4}),
    ("trellis", {"rate": 2, "dim": 8, "memory": 8}),
    ("trellis", {"rate": 1.5, "dim": 16, "memory": 6, "run": 1}),
]
LEARNER_SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("kmeans", {"iterations": 5}),
    ("kmeans", {"iterations": 5, "backend": "torch", "init": "random"}),
    ("kmeans", {"iterations": 5, "backend": "faiss"}),
    ("kmeans", {"iterations": 5, "backend": "sklearn"}),
    ("ema", {"steps": 5}),
    ("residual", {"stages": 2, "learner": {"type": "kmeans", "iterations": 3}}),
    ("product", {"learners": [{"type": "kmeans"}] * 3}),
    ("uniform", {"dim": 1}),
    ("gain_shape", {}),
    ("gain_shape", {"shape": "vector"}),
    ("simvq", {}),
    ("em", {}),
    ("gaussian", {"dim": 2}),
]
GROUPING_SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("contiguous", {"dim": 4}),
    ("strided", {"dim": 4}),
    ("whole", {}),
    ("whole", {"scope": "layer"}),
    ("rope_pairs", {"dim": 4}),
    ("energy_balanced", {"dim": 4}),
    ("energy_balanced", {"dim": 4, "pairs": True}),
    ("across_heads", {"dim": 8}),
]
TRANSFORM_SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("center", {}),
    ("channel_scale", {}),
    ("channel_scale", {"stat": "sqrt_absmax"}),
    ("channel_scale", {"stat": "query"}),
    ("token_scale", {}),
    ("token_scale", {"stat": "minmax", "scope": "layer"}),
    ("token_scale", {"stat": "minmax", "group": 4}),
    ("hadamard", {}),
    ("hadamard", {"scope": "layer", "block": 8}),
    ("page_scale", {"tokens": 16}),
    ("page_center", {"tokens": 16}),
    ("polar", {}),
    ("outliers", {"share": 0.1}),
    ("spectral", {}),
    ("spectral", {"scope": "layer", "metric": "output"}),
    ("pair_metric", {"dim": 4}),
]
PREDICTOR_SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("linear", {"scope": "head", "sources": [KEYS, VALUES]}),
    ("copy", {}),
]


@pytest.mark.parametrize(("name", "settings"), QUANTIZER_SETTINGS)
def test_quantizers(name: str, settings: dict[str, Any]) -> None:
    check_quantizer(QUANTIZERS.get(name), **settings)


@pytest.mark.parametrize(("name", "settings"), LEARNER_SETTINGS)
def test_learners(name: str, settings: dict[str, Any]) -> None:
    check_learner(LEARNERS.get(name), **settings)


@pytest.mark.parametrize(("name", "settings"), GROUPING_SETTINGS)
def test_groupings(name: str, settings: dict[str, Any]) -> None:
    check_grouping(GROUPINGS.get(name), **settings)


@pytest.mark.parametrize(("name", "settings"), TRANSFORM_SETTINGS)
def test_transforms(name: str, settings: dict[str, Any]) -> None:
    check_transform(TRANSFORMS.get(name), **settings)


@pytest.mark.parametrize(("name", "settings"), PREDICTOR_SETTINGS)
def test_predictors(name: str, settings: dict[str, Any]) -> None:
    check_predictor(PREDICTORS.get(name), **settings)


def test_every_builtin_has_a_row() -> None:
    for registry, rows in (
        (QUANTIZERS, QUANTIZER_SETTINGS),
        (LEARNERS, LEARNER_SETTINGS),
        (GROUPINGS, GROUPING_SETTINGS),
        (TRANSFORMS, TRANSFORM_SETTINGS),
        (PREDICTORS, PREDICTOR_SETTINGS),
    ):
        builtin = {name for name, who in registry.sources().items() if who == ["vqkv"]}
        assert builtin == {name for name, _ in rows}


def test_cache() -> None:
    model = tiny_model("llama", max_position_embeddings=1024)
    compressor = KVCompressor(load_scheme("scalar-4bit"), Geometry.from_config(model.config))
    check_cache(compressor, model)


class ForgetfulQuantizer(ProductQuantizer):
    """Says that it stores nothing."""

    def planned_bytes(self, subspaces: int, dim: int) -> int:
        return 0


class NoisyQuantizer(ProductQuantizer):
    """Draws noise when it encodes."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return super().encode(x + torch.randn_like(x))


class LossyGrouping(Contiguous):
    """Uses channel 0 twice."""

    def permutation(self, head_dim: int, heads: int, stats: ChannelStats) -> torch.Tensor:
        order = super().permutation(head_dim, heads, stats).clone()
        order[0, 1] = 0
        return order


def test_the_checks_can_fail() -> None:
    with pytest.raises(AssertionError, match="planned_bytes says 0"):
        check_quantizer(ForgetfulQuantizer, code_bits=4)
    with pytest.raises(AssertionError, match="deterministic"):
        check_quantizer(NoisyQuantizer, code_bits=4)
    with pytest.raises(AssertionError, match="every channel comes once"):
        check_grouping(LossyGrouping, dim=4)
