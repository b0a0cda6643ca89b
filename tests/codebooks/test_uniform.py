from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqkv.codebooks.uniform import Uniform
from vqkv.errors import SchemeError, StateError

from .data import inertia


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    codewords=st.integers(1, 64),
    scale=st.floats(1e-3, 1e3),
    middle=st.floats(-100, 100),
)
def test_at_most_half_a_step_from_a_level(
    seed: int, codewords: int, scale: float, middle: float
) -> None:
    x = middle + scale * torch.randn(64, 3, 1, generator=torch.Generator().manual_seed(seed))
    learner = Uniform().fit(x, codewords)
    error = (x - learner.codewords_[:, 0, :, 0]).abs().amin(-1)  # [N, M]
    half = (x.amax(0) - x.amin(0))[:, 0] / codewords / 2
    slack = 1e-6 * float(x.abs().max())
    assert bool((error <= half + slack).all())
    found = learner.health_[0].inertia[-1]
    assert found == pytest.approx(inertia(x, learner.codewords_[:, 0]), rel=1e-3, abs=slack**2)


def test_learned_levels_are_the_middles_of_equal_steps() -> None:
    x = torch.tensor([0.0, 8.0, 3.0]).view(3, 1, 1)
    learner = Uniform().fit(x.repeat(2, 1, 1), 4)
    assert learner.codewords_.flatten().tolist() == [1.0, 3.0, 5.0, 7.0]
    assert learner.health_[0].dead_after == 1  # the level 5


def test_levels_without_data() -> None:
    fixed = Uniform(low=-1, high=1).fixed(2, 1, 2)
    assert fixed is not None
    assert fixed.flatten(1).tolist() == [[-0.5, 0.5]] * 2
    assert Uniform().fixed(2, 1, 2) is None


def test_weights_count_in_health() -> None:
    x = torch.tensor([0.0, 4.0]).view(2, 1, 1)
    learner = Uniform(low=0, high=4).fit(x, 2, torch.tensor([3.0, 1.0]))
    assert learner.health_[0].inertia == (1.0,)
    assert learner.health_[0].entropy == pytest.approx(0.8112781)


def test_constant_data() -> None:
    learner = Uniform().fit(torch.full((9, 1, 1), 5.0), 4)
    assert learner.codewords_.unique().tolist() == [5.0]
    assert learner.health_[0].inertia == (0.0,)


def test_ends_that_make_no_range() -> None:
    with pytest.raises(SchemeError, match=r"`low` is below `high`, given 1\.0 and 1\.0"):
        Uniform(low=1, high=1)
    with pytest.raises(SchemeError, match="give both `low` and `high`, or neither"):
        Uniform(low=1)


def test_levels_are_scalar() -> None:
    with pytest.raises(StateError, match="groups of dim 1, given dim 4"):
        Uniform().fit(torch.zeros(9, 1, 4), 4)
    with pytest.raises(StateError, match="groups of dim 1, given dim 2"):
        Uniform(low=0, high=1).fixed(1, 2, 4)


def test_a_stream_has_the_range_of_all_batches() -> None:
    x = torch.randn(300, 2, 1, generator=torch.Generator().manual_seed(0))
    streamed = Uniform()
    for batch in x.split(50):
        streamed.partial_fit(batch, 8)
    torch.testing.assert_close(streamed.codewords_, Uniform().fit(x, 8).codewords_)
