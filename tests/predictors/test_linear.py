"""Linear predictors."""

from __future__ import annotations

import pytest
import torch

from vqkv.errors import NotFittedError, StateError
from vqkv.predictors.copy import Copy
from vqkv.predictors.linear import Linear
from vqkv.states import CHUNK_TOKENS, States

KEYS = {"stream": "keys", "back": 1}
VALUES = {"stream": "values", "back": 1}


def tokens(seed: int, count: int = 400) -> torch.Tensor:
    return torch.randn(count, 2, 4, generator=torch.Generator().manual_seed(seed)) + seed


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_it_finds_a_linear_relation(scope: str) -> None:
    first, second = tokens(1), tokens(2)
    mixing = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    x = torch.einsum("snhd,shde->nhe", torch.stack([first, second]), mixing) + 5
    predictor = Linear(sources=(KEYS, VALUES), ridge=1e-6, scope=scope)
    predictor.fit(States.of(x), [States.of(first), States.of(second)])
    error = predictor.predict([first, second]) - x
    assert error.norm() / x.norm() < 2e-3  # weights are stored in fp16
    assert predictor.head_local == (scope == "head")


def test_only_the_layer_scope_sees_other_heads() -> None:
    source = tokens(1)
    x = source.flip(1)
    left = {}
    for scope in ("head", "layer"):
        predictor = Linear(sources=(KEYS,), scope=scope)
        predictor.fit(States.of(x), [States.of(source)])
        left[scope] = float((predictor.predict([source]) - x).square().mean())
    assert left["layer"] < 0.01 < 0.5 < left["head"]


def test_it_never_does_worse_than_the_mean_on_what_it_was_fitted_to() -> None:
    source, x = tokens(1), tokens(2)
    predictor = Linear(sources=(KEYS,)).fit(States.of(x), [States.of(source)])
    left = (predictor.predict([source]) - x).square().sum()
    assert left <= (x - x.mean(0)).square().sum() * 1.001


def test_it_is_numpys_ridge_regression() -> None:
    source, x = tokens(1).double(), tokens(2).double()
    predictor = Linear(sources=(KEYS,), ridge=0.1).fit(
        States.of(x.float()), [States.of(source.float())]
    )
    s, y = source.flatten(1), x.flatten(1)
    s, y = s - s.mean(0), y - y.mean(0)
    gram = s.T @ s / len(s)
    penalty = 0.1 * gram.trace() / len(gram)
    expected = torch.linalg.solve(gram + penalty * torch.eye(8), s.T @ y / len(s))
    torch.testing.assert_close(predictor.weight_[0].double(), expected, atol=1e-3, rtol=1e-3)


def test_chunks_do_not_matter() -> None:
    source, x = tokens(1, CHUNK_TOKENS + 100), tokens(2, CHUNK_TOKENS + 100)
    whole = States(len(x), lambda: iter([x]))
    one = Linear(sources=(KEYS,)).fit(whole, [States(len(x), lambda: iter([source]))])
    many = Linear(sources=(KEYS,)).fit(States.of(x), [States.of(source)])
    torch.testing.assert_close(one.weight_, many.weight_, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("ridge", [1e-6, 1e-3])
@pytest.mark.parametrize("size", [0.0, 3.7, 100.3])
def test_a_source_that_never_varies_predicts_nothing(size: float, ridge: float) -> None:
    x = tokens(2)
    source = torch.full_like(x, size)
    predictor = Linear(sources=(KEYS,), ridge=ridge).fit(States.of(x), [States.of(source)])
    assert predictor.weight_.abs().max() < 1e-3
    torch.testing.assert_close(predictor.predict([source])[0], x.mean(0), atol=5e-3, rtol=5e-3)


def test_misuse() -> None:
    with pytest.raises(NotFittedError, match="call fit first"):
        Linear(sources=(KEYS,)).predict([tokens(1)])
    with pytest.raises(StateError, match="no tokens to learn from"):
        Linear(sources=(KEYS,)).fit(States.of(tokens(1)[:0]), [States.of(tokens(1)[:0])])
    with pytest.raises(StateError, match=r"beyond fp16's 65504: raise `ridge`"):
        Linear(sources=(KEYS,), ridge=1e-6).fit(States.of(1e6 * tokens(1)), [States.of(tokens(1))])
    with pytest.raises(StateError, match="state holds 'weight'"):
        Linear(sources=(KEYS, VALUES)).load_state(
            {"weight": torch.zeros(1, 8, 8).half(), "bias": torch.zeros(1, 8).half()}
        )


def test_a_copy_is_its_source() -> None:
    assert torch.equal(Copy(sources=(KEYS,)).predict([tokens(1)]), tokens(1))
