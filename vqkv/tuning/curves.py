"""A stream's cost by rate, from a few rates at which it was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

#: An ideal code's cost falls by this factor per bit (rate-distortion theory, high rates).
IDEAL = 4.0


class Curve:
    """Cost by rate: straight lines between measured points, cost on a logarithmic scale.

    Outside of them the line of the nearest two goes on. Made convex and falling, as costs of good
    codes are: measured points that are not are noise, or rates at which the codes of other streams
    were better.

    Args:
        points: of rate in bits per value and cost; of one rate the last counts.
    """

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        known = {rate: math.log(max(cost, 1e-300)) for rate, cost in points}
        self._points = _lower_hull(sorted(known.items()))

    def __call__(self, rate: float) -> float:
        """Cost at a rate."""
        points = self._points
        if len(points) == 1:
            (at, level), slope = points[0], -math.log(IDEAL)
        else:
            inner = (i for i, (measured, _) in enumerate(points[1:-1], 1) if rate <= measured)
            right = next(inner, len(points) - 1)
            (at, level), (then, lower) = points[right - 1], points[right]
            slope = (lower - level) / (then - at)
        return math.exp(level + slope * (rate - at))


def _lower_hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points of a convex line below all, but for those where it would rise."""
    hull: list[tuple[float, float]] = []
    for point in points:
        while len(hull) >= 2 and _turns_down(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    while len(hull) >= 2 and hull[-1][1] >= hull[-2][1]:
        hull.pop()
    return hull


def _turns_down(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b lies above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])
