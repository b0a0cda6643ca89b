"""Bits are shared out within the budget, and no other choice costs less."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqkv.compressor import StreamKey
from vqkv.errors import SchemeError
from vqkv.tuning.allocation import allocate
from vqkv.tuning.curves import Curve
from vqkv.tuning.rates import ProductStep, Step, ladder

EVEN = tuple(ProductStep(1, bits) for bits in range(1, 7))
KEYS: list[StreamKey] = [(layer, stream) for layer in range(4) for stream in ("keys", "values")]


@given(
    st.lists(st.lists(st.floats(0, 9), min_size=3, max_size=3), min_size=4, max_size=4),
    st.floats(1, 4),
)
def test_no_other_choice_within_the_budget_costs_less(
    tables: list[list[float]], bits: float
) -> None:
    """Whatever the costs: neither they nor the steps, 1, 2 and 4 bits, need be even."""
    steps = ladder((2, 4, 8), (8,))
    named = dict(zip(KEYS, tables, strict=False))
    costs = {key: partial(_looked_up, table) for key, table in named.items()}
    found = allocate(costs, steps, bits)

    def cost(choice: Sequence[Step]) -> float:
        return sum(costs[key](step.rate) for key, step in zip(named, choice, strict=True))

    within = [
        choice
        for choice in product(steps, repeat=len(named))
        if sum(step.rate for step in choice) <= bits * len(named) + 1e-9
    ]
    assert tuple(found.values()) in within
    assert cost(tuple(found.values())) == pytest.approx(min(map(cost, within)))


def _looked_up(table: list[float], rate: float) -> float:
    return table[int(math.log2(rate))]


def test_the_dearest_stream_gets_the_most_bits() -> None:
    costs = {KEYS[0]: Curve([(2, 1.0)]), KEYS[1]: Curve([(2, 1 / 16)])}
    steps = ladder((2, 4, 8), (8,))
    assert [step.rate for step in allocate(costs, steps, 3).values()] == [4, 2]
    assert [step.rate for step in allocate(costs, steps, 1).values()] == [1, 1]


def test_a_budget_below_the_lowest_step_is_refused() -> None:
    with pytest.raises(SchemeError, match=r"0\.5 bits: the lowest rate is 1"):
        allocate({KEYS[0]: Curve([(2, 1.0)])}, EVEN, 0.5)


def test_a_curve_goes_through_its_points_and_on_beyond_them() -> None:
    curve = Curve([(1, 8.0), (2, 2.0), (3, 1.0)])
    found = [curve(rate) for rate in (0, 1, 1.5, 2, 3, 4)]
    assert found == pytest.approx([32, 8, 4, 2, 1, 0.5])
    assert Curve([(2, 1.0)])(3) == pytest.approx(0.25)


@given(
    st.dictionaries(
        st.sampled_from([1, 1.5, 2, 2.25, 3, 4]), st.floats(1e-4, 1e2), min_size=1, max_size=6
    )
)
def test_a_curve_falls_ever_more_slowly(points: dict[float, float]) -> None:
    curve = Curve(list(points.items()))
    logs = [math.log(curve(0.5 + 0.25 * i)) for i in range(17)]
    falls = [a - b for a, b in pairwise(logs)]
    assert all(fall >= -1e-6 for fall in falls)
    assert all(later <= fall + 1e-6 for fall, later in pairwise(falls))
