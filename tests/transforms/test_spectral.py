"""The spectral transform: its space, its metric, its ranks."""

from __future__ import annotations

import pytest
import torch

from vqkv.errors import NotFittedError, StateError
from vqkv.states import States
from vqkv.transforms.spectral import Spectral

HEADS, DIM = 3, 8


def tokens(count: int = 500, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(HEADS, DIM, DIM, generator=generator)
    x = torch.randn(count, HEADS, DIM, generator=generator)
    return torch.einsum("nhd,hde->nhe", x, mixing) + 2


def metric(seed: int = 1) -> torch.Tensor:
    root = torch.randn(HEADS, DIM, DIM, generator=torch.Generator().manual_seed(seed))
    return root @ root.transpose(1, 2)


def ranks(z: torch.Tensor, scope: str) -> torch.Tensor:
    """Variances by rank: of each head, or of the layer."""
    variances = z.var(0, correction=0)
    return variances if scope == "head" else variances.t().reshape(1, -1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scope", ["head", "layer"])
def test_channels_come_out_uncorrelated_and_strongest_first(scope: str, weighted: bool) -> None:
    kind = "query" if weighted else None
    transform = Spectral(scope=scope, metric=kind)
    transform.fit(States.of(tokens()), metric() if weighted else None)
    z, side = transform.forward(tokens())
    assert side is None
    assert z.mean(0).abs().max() < 0.05
    found = ranks(z, scope)
    assert bool((found.diff(dim=1) <= 1e-3 * found[:, :1]).all())
    rows = z.flatten(1) if scope == "layer" else z[:, 0]
    correlation = torch.corrcoef(rows.t())
    assert (correlation - torch.eye(len(correlation))).abs().max() < 0.05


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_squared_error_is_the_error_in_the_metric(scope: str) -> None:
    transform = Spectral(scope=scope, metric="output")
    transform.fit(States.of(tokens()), metric())
    x = tokens(seed=5)
    z, _ = transform.forward(x)
    moved = z + 0.1 * torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    error = transform.inverse(moved, None) - x
    cost = torch.einsum("nhd,hde,nhe->n", error, metric(), error)
    # The metric is taken at mean eigenvalue 1: of each head, or of all together.
    means = metric().diagonal(dim1=1, dim2=2).mean(1)
    if scope == "layer":
        torch.testing.assert_close(
            (moved - z).square().sum((1, 2)), cost / means.mean(), rtol=1e-2, atol=1e-2
        )
    else:
        costs = torch.einsum("nhd,hde,nhe->nh", error, metric(), error) / means
        torch.testing.assert_close((moved - z).square().sum(2), costs, rtol=1e-2, atol=1e-2)


def test_the_inverse_undoes_the_stored_matrix_rounding_included() -> None:
    transform = Spectral(metric="query").fit(States.of(tokens()), metric())
    x = tokens(seed=3)
    torch.testing.assert_close(
        transform.inverse(transform.forward(x)[0], None), x, atol=1e-4, rtol=1e-4
    )


def test_a_singular_metric_is_floored() -> None:
    flat = torch.zeros(HEADS, DIM, DIM)
    flat[:, 0, 0] = 1
    transform = Spectral(metric="query").fit(States.of(tokens()), flat)
    x = tokens(seed=3)
    torch.testing.assert_close(
        transform.inverse(transform.forward(x)[0], None), x, atol=1e-2, rtol=1e-2
    )


def test_it_learns_in_chunks() -> None:
    x = tokens(100)
    whole = Spectral().fit(States.of(x))
    parts = Spectral().fit(States(100, lambda: iter(x.split(7))))
    torch.testing.assert_close(whole.matrix_, parts.matrix_, atol=1e-3, rtol=1e-3)


def test_misuse() -> None:
    with pytest.raises(NotFittedError, match="call fit first"):
        Spectral().forward(tokens())
    with pytest.raises(StateError, match="the metric 'query' is configured, none was given"):
        Spectral(metric="query").fit(States.of(tokens()))
    with pytest.raises(StateError, match="no tokens"):
        Spectral().fit(States.of(tokens()[:0]))
    fitted = Spectral(scope="layer").fit(States.of(tokens()))
    with pytest.raises(StateError, match="state holds 'mean'"):
        Spectral(scope="head").load_state(fitted.state())
