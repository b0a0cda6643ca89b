"""Bits are shared out within the budget, and no exchange of one step for another saves anything."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqkv.compressor import StreamKey
from vqkv.errors import SchemeError
from vqkv.tuning.allocation import allocate
from vqkv.tuning.curves import Curve
from vqkv.tuning.rates import Step, ladder

EVEN = tuple(Step(1, bits) for bits in range(1, 7))
KEYS: list[StreamKey] = [(layer, stream) for layer in range(4) for stream in ("keys", "values")]


def exponential(level: float, slope: float, rate: float) -> float:
    return math.exp(level - slope * rate)


@given(
    st.lists(
        st.tuples(st.floats(-9, 9), st.floats(0.2, 2)), min_size=len(KEYS), max_size=len(KEYS)
    ),
    st.floats(1, 6),
)
def test_of_convex_costs_and_even_steps_nothing_is_better(
    curves: list[tuple[float, float]], bits: float
) -> None:
    costs = {key: partial(exponential, *curve) for key, curve in zip(KEYS, curves, strict=True)}
    found = allocate(costs, EVEN, bits)
    assert sum(step.rate for step in found.values()) <= bits * len(KEYS) + 1e-6
    saved = [costs[key](step.rate - 1) - costs[key](step.rate) for key, step in found.items()]
    more = {key: costs[key](step.rate) - costs[key](step.rate + 1) for key, step in found.items()}
    for gain in (more[key] for key, step in found.items() if step.rate < 6):
        for (_, step), loss in zip(found.items(), saved, strict=True):
            assert step.rate == 1 or gain <= loss * (1 + 1e-9)


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
