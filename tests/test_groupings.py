from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqkv.errors import NotFittedError, SchemeError
from vqkv.groupings import GROUPINGS, ChannelStats, Grouping
from vqkv.rotation import Pairing, Pairs, rope_pairs

WITH_DIM = sorted({*GROUPINGS.names()} - {"whole"})


def build(name: str, **settings: Any) -> Grouping:
    return GROUPINGS.get(name)(**settings)


def groups(
    grouping: Grouping, head_dim: int, heads: int = 1, pairs: Pairs = (), energy: Any = None
) -> list[list[int]]:
    """The channels of each subvector."""
    stats = ChannelStats(None if energy is None else torch.tensor(energy), pairs)
    order = grouping.permutation(head_dim, heads, stats)
    found: list[list[int]] = order.reshape(-1, grouping.dim).tolist()
    return found


HALF = rope_pairs("half", 8)


# -- the examples of the docstrings ------------------------------------------------------------


def test_contiguous() -> None:
    assert groups(build("contiguous", dim=4), 8) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert groups(build("contiguous", dim=4), 4, heads=2) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_strided() -> None:
    assert groups(build("strided", dim=4), 8) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert groups(build("strided", dim=2), 4, heads=2) == [[0, 2], [1, 3], [4, 6], [5, 7]]


def test_whole() -> None:
    assert groups(build("whole").resolved(2, 4), 4, heads=2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    (token,) = groups(build("whole", scope="layer").resolved(2, 4), 4, heads=2)
    assert sorted(token) == list(range(8))
    assert build("whole").keeps_pairs(8, HALF)


def test_rope_pairs() -> None:
    assert groups(build("rope_pairs", dim=4), 8, pairs=HALF) == [[0, 4, 1, 5], [2, 6, 3, 7]]
    interleaved = rope_pairs("interleaved", 8)
    assert groups(build("rope_pairs", dim=4), 8, pairs=interleaved) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    partial = rope_pairs("half", 4)
    assert groups(build("rope_pairs", dim=4), 8, pairs=partial) == [[0, 2, 1, 3], [4, 5, 6, 7]]


def test_energy_balanced_deals_in_snake_order() -> None:
    falling = [[8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]]
    assert groups(build("energy_balanced", dim=4), 8, energy=falling) == [
        [0, 3, 4, 7],
        [1, 2, 5, 6],
    ]
    rising = [falling[0][::-1]]
    assert groups(build("energy_balanced", dim=4), 8, energy=rising) == [[7, 4, 3, 0], [6, 5, 2, 1]]


def test_energy_balanced_orders_each_head_by_itself() -> None:
    energy = [[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]]
    assert groups(build("energy_balanced", dim=2), 4, heads=2, energy=energy) == [
        [0, 3],
        [1, 2],
        [7, 4],
        [6, 5],
    ]


def test_energy_balanced_of_equal_channels_keeps_their_order() -> None:
    assert groups(build("energy_balanced", dim=2), 4, energy=[[1.0] * 4]) == [[0, 3], [1, 2]]


def test_energy_balanced_pairs_deal_pairs_by_their_sum() -> None:
    energy = [[1.0, 9.0, 3.0, 4.0, 1.0, 0.0, 3.0, 4.0]]  # pair sums 2, 9, 6, 8
    assert groups(build("energy_balanced", dim=4, pairs=True), 8, pairs=HALF, energy=energy) == [
        [1, 5, 0, 4],
        [3, 7, 2, 6],
    ]


def test_across_heads() -> None:
    assert groups(build("across_heads", dim=4), 4, heads=2) == [[0, 4, 1, 5], [2, 6, 3, 7]]


# -- what is always true -----------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> tuple[Grouping, int, int, Pairs]:
    name = draw(st.sampled_from(WITH_DIM))
    dim = draw(st.integers(1, 6))
    settings: dict[str, Any] = {}
    if name == "energy_balanced":
        settings["pairs"] = draw(st.booleans())
    if name == "rope_pairs" or settings.get("pairs"):
        dim *= 2
    heads = draw(st.integers(1, 4))
    head_dim = dim * draw(st.integers(1, 6))
    rotary = 2 * draw(st.integers(0, head_dim // 2))
    pairing: Pairing = draw(st.sampled_from(["half", "interleaved"]))
    return build(name, dim=dim, **settings), head_dim, heads, rope_pairs(pairing, rotary)


@given(cases(), st.integers(0, 99))
def test_orders_are_permutations_and_keep_the_pairs_they_say(
    case: tuple[Grouping, int, int, Pairs], seed: int
) -> None:
    grouping, head_dim, heads, pairs = case
    energy = torch.rand(heads, head_dim, generator=torch.Generator().manual_seed(seed))
    order = grouping.permutation(head_dim, heads, ChannelStats(energy, pairs))
    assert order.dtype == torch.int64
    assert torch.equal(order.flatten().sort().values, torch.arange(heads * head_dim))
    if grouping.head_local:
        assert order.shape == (heads, head_dim)
        assert torch.equal(order // head_dim, torch.arange(heads)[:, None].expand_as(order))
    else:
        assert order.shape == (1, heads * head_dim)
    group = torch.zeros(heads * head_dim, dtype=torch.int64)
    group[order.flatten()] = torch.arange(heads * head_dim) // grouping.dim
    whole = all(
        group[h * head_dim + i] == group[h * head_dim + j] for h in range(heads) for i, j in pairs
    )
    if grouping.keeps_pairs(head_dim, pairs):
        assert whole
    elif grouping.type in ("contiguous", "strided"):
        assert not whole  # these know their order beforehand, so their no is exact


@pytest.mark.parametrize(
    ("name", "dim", "pairing", "whole"),
    [
        ("contiguous", 4, "half", False),
        ("contiguous", 4, "interleaved", True),
        ("contiguous", 16, "half", True),
        ("contiguous", 1, "interleaved", False),
        ("strided", 4, "half", True),
        ("strided", 4, "interleaved", False),
        ("strided", 1, "half", False),
        ("rope_pairs", 4, "half", True),
        ("rope_pairs", 4, "interleaved", True),
        ("energy_balanced", 4, "half", False),
        ("across_heads", 4, "half", False),
    ],
)
def test_which_groupings_keep_pairs(name: str, dim: int, pairing: Pairing, whole: bool) -> None:
    assert build(name, dim=dim).keeps_pairs(16, rope_pairs(pairing, 16)) is whole


@pytest.mark.parametrize("name", WITH_DIM)
def test_without_rope_no_pair_is_broken(name: str) -> None:
    assert build(name, dim=2).keeps_pairs(16, ())


# -- what is refused ---------------------------------------------------------------------------


def test_a_dim_that_does_not_divide() -> None:
    with pytest.raises(
        SchemeError,
        match=r"^grouping\.dim: 5 does not divide head dim 16; one of 1, 2, 4, 8, 16 does$",
    ):
        build("contiguous", dim=5).check(16, 2, ())
    with pytest.raises(SchemeError, match=r"5 does not divide 2 × 16 channels; one of 1, 2, 4, 8"):
        build("across_heads", dim=5).check(16, 2, ())
    build("across_heads", dim=32).check(16, 2, ())


def test_rope_pairs_need_pairs() -> None:
    with pytest.raises(SchemeError, match="values, and keys of a model without RoPE, have none"):
        build("rope_pairs", dim=4).check(16, 2, ())


def test_whole_pairs_need_an_even_dim() -> None:
    with pytest.raises(SchemeError, match="whole pairs need an even dim, given 3"):
        build("energy_balanced", dim=3, pairs=True).check(12, 1, HALF)


def test_energy_needs_data() -> None:
    with pytest.raises(NotFittedError, match="call fit first"):
        build("energy_balanced", dim=4).permutation(8, 1, ChannelStats(None, ()))
