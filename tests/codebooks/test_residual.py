from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqkv.codebooks.kmeans import KMeansConfig
from vqkv.codebooks.residual import ResidualLearner
from vqkv.errors import StateError
from vqkv.kernels.decode import decode
from vqkv.kernels.encode import encode

from .data import mixture


def test_stages_nest() -> None:
    x = mixture(300, 2, 4)
    two, four = (ResidualLearner(stages=s).fit(x, 8, seed=3) for s in (2, 4))
    assert four.codewords_.shape == (2, 4, 8, 4)
    assert len(four.health_) == 4
    assert torch.equal(four.codewords_[:, :2], two.codewords_)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), codewords=st.integers(1, 16), weighted=st.booleans())
def test_no_stage_raises_the_error_on_the_fitting_data(
    seed: int, codewords: int, weighted: bool
) -> None:
    """Means are better than zero for any assignment, and the final assignment than any other."""
    x = mixture(80, 2, 3, seed=seed)
    weights = torch.rand(80, 2) + 0.01 if weighted else None
    learner = ResidualLearner(stages=4, learner=KMeansConfig(iterations=2))
    learner.fit(x, codewords, weights, seed=seed)
    weight = torch.ones(80, 2) if weights is None else weights
    energy = float(((x.square().sum(-1) * weight).sum(0) / weight.sum(0)).mean())
    errors = [energy, *(health.inertia[-1] for health in learner.health_)]
    slack = 1e-6 * energy
    assert all(after <= before + slack for before, after in pairwise(errors))


def test_a_stage_learns_what_is_left() -> None:
    """Two stages of 4 describe a grid of 16 points exactly."""
    coarse = torch.tensor([-10.0, 10.0])
    fine = torch.tensor([-1.0, 1.0])
    x = (coarse[:, None] + fine).flatten()
    grid = torch.cartesian_prod(x, x).unsqueeze(1).repeat(5, 1, 1)
    learner = ResidualLearner(stages=2).fit(grid, 4)
    assert learner.health_[0].inertia[-1] == pytest.approx(2.0)
    assert learner.health_[1].inertia[-1] < 1e-10


def test_too_few_samples() -> None:
    with pytest.raises(StateError, match="16 codewords need at least as many samples, given 8"):
        ResidualLearner(stages=2).fit(mixture(8, 2, 4), 16)


@pytest.mark.parametrize("inner", ["kmeans", "ema"])
def test_a_stream_goes_on_learning(inner: str) -> None:
    x = mixture(4000, 2, 4)
    learner = ResidualLearner(stages=3, learner={"type": inner})
    errors = []
    for batch in [*x.split(1000)] * 4:
        learner.partial_fit(batch, 8)
        books = learner.codewords_
        errors.append(float((x - decode(encode(x, books), books)).square().mean()))
    assert books.shape == (2, 3, 8, 4)
    assert [len(health.inertia) >= 16 for health in learner.health_] == [True] * 3
    assert errors[-1] < 0.9 * errors[0]


def test_a_learner_that_does_not_stream_says_so() -> None:
    with pytest.raises(StateError, match="SimVQ needs all samples at once"):
        ResidualLearner(stages=2, learner={"type": "simvq"}).partial_fit(mixture(50, 1, 4), 4)
