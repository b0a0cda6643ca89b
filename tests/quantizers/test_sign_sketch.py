"""Signs of random projections."""

from __future__ import annotations

import pytest
import torch

from vqkv.errors import SchemeError, StateError
from vqkv.quantizers.sign_sketch import SignSketch, SignSketchConfig


def test_inner_products_are_unbiased() -> None:
    """QJL, Lemma 3.2: over the draw of S, `E⟨q, x̂⟩ = ⟨q, x⟩` for a unit vector x."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(16, generator=generator)
    x = torch.nn.functional.normalize(torch.randn(1, 1, 16, generator=generator), dim=2)
    scores = []
    for seed in range(400):
        sketch = SignSketch(rate=8, seed=seed)
        scores.append(float(sketch.decode(sketch.encode(x))[0, 0] @ q))
    found = torch.tensor(scores)
    standard_error = float(found.std()) / len(found) ** 0.5
    assert abs(float(found.mean()) - float(x[0, 0] @ q)) < 4 * standard_error


def test_more_signs_lower_the_error() -> None:
    x = torch.nn.functional.normalize(torch.randn(500, 1, 32), dim=2)
    errors = []
    for rate in (1, 2, 4, 8):
        sketch = SignSketch(rate=rate)
        codes = sketch.encode(x)
        assert codes.shape == (500, 1, 32 * rate)
        errors.append(float((sketch.decode(codes) - x).square().sum(2).mean()))
    assert errors == sorted(errors, reverse=True)


def test_signs_are_whole() -> None:
    with pytest.raises(SchemeError, match=r"0\.3 signs for each of 16 channels are 4\.8"):
        SignSketchConfig(rate=0.3).stages(16)


def test_there_is_no_state() -> None:
    sketch = SignSketch(rate=1)
    assert sketch.state() == {}
    with pytest.raises(StateError, match="no state"):
        sketch.load_state({"x": torch.zeros(1)})
