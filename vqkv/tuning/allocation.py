"""Bits where they save the most: rates of all streams under one budget."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence

from vqkv.compressor import StreamKey
from vqkv.errors import SchemeError
from vqkv.tuning.rates import Step

#: What a stream costs at a rate.
Cost = Callable[[float], float]


def allocate(
    costs: Mapping[StreamKey, Cost], steps: Sequence[Step], bits: float
) -> dict[StreamKey, Step]:
    """A step for each stream, `bits` on average or less.

    Greedy: all streams begin at the lowest step, and the one whose next step saves the most cost
    per bit takes it, while the budget allows. Where costs are convex in the rate no other choice
    of the same bits costs less.

    Raises:
        SchemeError: the lowest step is above the budget.
    """
    if steps[0].rate > bits:
        raise SchemeError(f"{bits:g} bits: the lowest rate is {steps[0].rate:g}")
    chosen: dict[StreamKey, int] = dict.fromkeys(costs, 0)
    left = (bits - steps[0].rate) * len(costs)
    heap: list[tuple[float, StreamKey]] = []

    def push(key: StreamKey) -> None:
        now, then = (steps[chosen[key] + i].rate for i in (0, 1))
        heapq.heappush(heap, ((costs[key](then) - costs[key](now)) / (then - now), key))

    for key in costs:
        if len(steps) > 1:
            push(key)
    while heap:
        _, key = heapq.heappop(heap)
        price = steps[chosen[key] + 1].rate - steps[chosen[key]].rate
        if price > left + 1e-9:
            continue
        left -= price
        chosen[key] += 1
        if chosen[key] + 1 < len(steps):
            push(key)
    return {key: steps[index] for key, index in chosen.items()}
