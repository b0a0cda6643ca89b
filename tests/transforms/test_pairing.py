"""Grouping of pairs: what ideal codes leave, and exchanges that leave less of it."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqkv.rotation import rope_pairs
from vqkv.transforms.pairing import left_over, paired_groups

HEAD_DIM, BITS = 16, 8
PAIRS = rope_pairs("half", HEAD_DIM)


def definite(seed: int, channels: int = HEAD_DIM) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    return root @ root.mT


def left(groups: torch.Tensor, cov: torch.Tensor, metric: torch.Tensor) -> float:
    """Of groups of channels `[G, d]`, by the roots of another decomposition."""
    total = 0.0
    for group in groups:
        factor = torch.linalg.cholesky(metric[group][:, group])
        total += float(left_over(factor.mT @ cov[group][:, group] @ factor, BITS))
    return total


def test_many_bits_are_shared_evenly() -> None:
    cov = definite(0, 4)
    expected = 4 * (torch.linalg.det(cov) * 2.0 ** (-2 * 40)) ** 0.25
    assert float(left_over(cov, 40)) == pytest.approx(float(expected), rel=1e-9)


def test_weak_channels_get_none() -> None:
    # 2 bits for the strong one leave 16 / 2⁴ = 1 of it, still more than there is of the others.
    cov = torch.diag(torch.tensor([0.5, 16.0, 0.25], dtype=torch.float64))
    assert float(left_over(cov, 2)) == pytest.approx(1 + 0.5 + 0.25)


@given(st.integers(0, 1000), st.integers(0, 12))
def test_more_bits_leave_less(seed: int, bits: int) -> None:
    cov = definite(seed, 3)
    before, after = float(left_over(cov, bits)), float(left_over(cov, bits + 1))
    assert 0 < after < before <= float(cov.trace()) * (1 + 1e-9)
    # No code of a channel falls by more than a factor of four with a bit.
    assert after >= before / 4 * (1 - 1e-9)


def test_what_holds_still_leaves_nothing() -> None:
    assert float(left_over(torch.zeros(4, 4, dtype=torch.float64), 8)) == pytest.approx(0)


@pytest.mark.parametrize("dim", [2, 4, 8, 16])
def test_no_exchange_of_two_pairs_leaves_less(dim: int) -> None:
    cov, metric = definite(1), definite(2)
    order = paired_groups(cov, metric, PAIRS, dim, BITS)
    assert sorted(map(tuple, order.view(-1, 2).tolist())) == sorted(PAIRS)
    groups = order.view(-1, dim // 2, 2)
    best = left(groups.flatten(1), cov, metric)
    for one, other in combinations(range(len(groups)), 2):
        for i, j in product(range(dim // 2), repeat=2):
            tried = groups.clone()
            tried[one, i], tried[other, j] = groups[other, j], groups[one, i]
            assert left(tried.flatten(1), cov, metric) >= best * (1 - 1e-6)


def test_groups_that_leave_most_come_first() -> None:
    cov, metric = definite(3), definite(4)
    groups = paired_groups(cov, metric, PAIRS, 4, BITS).view(-1, 4)
    costs = [left(group[None], cov, metric) for group in groups]
    assert costs == sorted(costs, reverse=True)


def test_pairs_that_tell_about_each_other_are_coded_together() -> None:
    # Pair p is pair p + 4, but for a little noise.
    eye = torch.eye(HEAD_DIM, dtype=torch.float64)
    cov = 1.01 * eye
    for one, other in zip(PAIRS[:4], PAIRS[4:], strict=True):
        for a, b in zip(one, other, strict=True):
            cov[a, b] = cov[b, a] = 1
    groups = paired_groups(cov, eye, PAIRS, 4, BITS).view(-1, 4).tolist()
    assert sorted(map(sorted, groups)) == sorted(
        sorted((*one, *other)) for one, other in zip(PAIRS[:4], PAIRS[4:], strict=True)
    )


def test_channels_that_hold_still_are_grouped_too() -> None:
    zeros = torch.zeros(HEAD_DIM, HEAD_DIM, dtype=torch.float64)
    order = paired_groups(zeros, zeros, PAIRS, 4, BITS)
    assert sorted(order.tolist()) == list(range(HEAD_DIM))
