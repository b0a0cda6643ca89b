"""The pair metric: whole pairs in groups, and squared error that is the cost of each group."""

from __future__ import annotations

import pytest
import torch

from vqkv.errors import NotFittedError, SchemeError, StateError
from vqkv.rotation import Pairs, rope_pairs
from vqkv.states import States
from vqkv.transforms.pair_metric import PairMetric

HEADS, DIM, HEAD_DIM = 2, 4, 16
PAIRS = rope_pairs("half", HEAD_DIM)


def tokens(count: int = 300, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(HEADS, HEAD_DIM, HEAD_DIM, generator=generator)
    x = torch.randn(count, HEADS, HEAD_DIM, generator=generator)
    return torch.einsum("nhd,hde->nhe", x, mixing) + 2


def metric(seed: int = 1) -> torch.Tensor:
    shape = (HEADS, HEAD_DIM, HEAD_DIM)
    root = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return root @ root.mT


def fitted(pairs: Pairs = PAIRS) -> PairMetric:
    return PairMetric(dim=DIM).fit(States.of(tokens()), metric(), pairs)


def groups(transform: PairMetric) -> torch.Tensor:
    """The channels of each group, `[H, G, d]`."""
    found: torch.Tensor = transform.order_.unflatten(1, (-1, DIM))
    return found


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_groups_hold_whole_pairs_side_by_side(pairing: str) -> None:
    pairs = rope_pairs(pairing, HEAD_DIM)  # type: ignore[arg-type]
    found = groups(fitted(pairs)).reshape(-1, 2).tolist()
    assert sorted(map(tuple, found)) == sorted(HEADS * pairs)


def test_channels_outside_of_pairs_go_two_by_two() -> None:
    partial = rope_pairs("half", 8)
    found = groups(fitted(partial)).reshape(-1, 2).tolist()
    units = (*partial, (8, 9), (10, 11), (12, 13), (14, 15))
    assert sorted(map(tuple, found)) == sorted(HEADS * units)


def test_the_strongest_pairs_are_dealt_to_groups_of_their_own() -> None:
    strength = torch.tensor([1.0, 100, 1, 1, 100, 1, 100, 100]).repeat(2)  # by pair
    x = strength * torch.randn(300, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    even = torch.eye(HEAD_DIM).expand(HEADS, -1, -1)
    transform = PairMetric(dim=DIM).fit(States.of(x), even, PAIRS)
    for group in groups(transform).flatten(0, 1):
        assert len({1, 4, 6, 7} & set(group.tolist())) == 1


def test_the_inverse_mixes_no_groups() -> None:
    transform = fitted()
    z, _ = transform.forward(tokens(1, seed=4))
    for group in range(HEAD_DIM // DIM):
        moved = z.clone()
        moved[:, :, group * DIM : (group + 1) * DIM] += 1
        change = transform.inverse(moved, None) != transform.inverse(z, None)
        for head in range(HEADS):
            reached = change[0, head].nonzero().flatten().tolist()
            assert set(reached) <= set(groups(transform)[head, group].tolist())


def test_squared_error_of_a_group_is_its_error_in_the_metric() -> None:
    transform = fitted()
    x = tokens(seed=5)
    z, _ = transform.forward(x)
    scale = metric().diagonal(dim1=1, dim2=2).mean(1)  # the metric is taken at mean eigenvalue 1
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    for group in range(HEAD_DIM // DIM):
        step = torch.zeros_like(z)
        own = slice(group * DIM, (group + 1) * DIM)
        step[:, :, own] = noise[:, :, own]
        error = transform.inverse(z + step, None) - x
        cost = torch.einsum("nhd,hde,nhe->nh", error, metric(), error) / scale
        torch.testing.assert_close(step.square().sum(2), cost, rtol=2e-2, atol=1e-2)


def test_misuse() -> None:
    with pytest.raises(NotFittedError, match="call fit first"):
        PairMetric(dim=DIM).forward(tokens())
    with pytest.raises(StateError, match="the metric 'query' is needed"):
        PairMetric(dim=DIM).fit(States.of(tokens()))
    with pytest.raises(StateError, match="no tokens"):
        PairMetric(dim=DIM).fit(States.of(tokens()[:0]), metric())
    with pytest.raises(SchemeError, match="6 does not divide head dim 16"):
        PairMetric(dim=6).check(HEADS, HEAD_DIM)
    state = fitted().state()
    with pytest.raises(StateError, match="state holds 'mean'"):
        PairMetric(dim=8).load_state(state)
    with pytest.raises(StateError, match="state holds 'mean'"):
        PairMetric(dim=DIM).load_state({})
    with pytest.raises(StateError, match="no permutation of 16 channels"):
        PairMetric(dim=DIM).load_state({**state, "order": torch.zeros_like(state["order"])})
