"""Bits where they save the most: rates of all streams under one budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from math import floor, gcd, lcm

import numpy as np

from vqkv.compressor import StreamKey
from vqkv.errors import SchemeError
from vqkv.tuning.rates import Step

#: What a stream costs at a rate.
Cost = Callable[[float], float]


def allocate(
    costs: Mapping[StreamKey, Cost], steps: Sequence[Step], bits: float
) -> dict[StreamKey, Step]:
    """The steps of least cost in all, `bits` on average or less.

    Exact, whatever the costs and steps: dynamic programming over the budget, in units that all
    rates are multiples of.

    Raises:
        SchemeError: the lowest step is above the budget.
    """
    if steps[0].rate > bits:
        raise SchemeError(f"{bits:g} bits: the lowest rate is {steps[0].rate:g}")
    rates = [Fraction(step.rate).limit_denominator(1024) for step in steps]
    parts = lcm(*(rate.denominator for rate in rates))
    sizes = [int(rate * parts) for rate in rates]
    unit = gcd(*sizes)
    sizes = [size // unit for size in sizes]
    room = floor(bits * len(costs) * parts / unit + 1e-9)
    least = np.zeros(room + 1)  # cost of the streams so far, by units that they may take
    taken = []
    for cost in costs.values():
        options = np.full((len(steps), room + 1), np.inf)
        for row, (size, step) in enumerate(zip(sizes, steps, strict=True)):
            if size <= room:
                options[row, size:] = least[: room + 1 - size] + cost(step.rate)
        taken.append(options.argmin(0))
        least = options.min(0)
    chosen: dict[StreamKey, Step] = {}
    for key, choice in zip(reversed(list(costs)), reversed(taken), strict=True):
        index = int(choice[room])
        chosen[key] = steps[index]
        room -= sizes[index]
    return {key: chosen[key] for key in costs}
