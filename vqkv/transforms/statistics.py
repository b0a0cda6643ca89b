"""Statistics of a stream's channels, gathered chunk by chunk in fp64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch

from vqkv.errors import StateError
from vqkv.states import States


@dataclass(frozen=True)
class Moments:
    """Per channel `[H, D]` (fp64), over all tokens of a stream."""

    tokens: int
    mean: torch.Tensor
    variance: torch.Tensor
    absmax: torch.Tensor

    @property
    def std(self) -> torch.Tensor:
        """Standard deviation."""
        return self.variance.sqrt()

    @property
    def rms(self) -> torch.Tensor:
        """Root of the mean square."""
        return (self.variance + self.mean.square()).sqrt()

    def __add__(self, other: Moments) -> Moments:
        """Of both tokens together; exact for channels that hold still (Chan et al. 1979)."""
        tokens = self.tokens + other.tokens
        share = other.tokens / tokens
        shift = other.mean - self.mean
        return Moments(
            tokens,
            self.mean + share * shift,
            torch.lerp(self.variance, other.variance, share) + share * (1 - share) * shift.square(),
            torch.maximum(self.absmax, other.absmax),
        )


def moments(states: States) -> Moments:
    """One pass over a stream. Raises StateError where it is empty."""
    found = [_of_chunk(chunk.double()) for chunk in states.chunks() if len(chunk)]
    if not found:
        raise StateError("there are no tokens to learn from")
    return reduce(add, found)


def mean_and_covariance(
    states: States, rows: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean `[H, D]`, and covariance `[V, n, n]` of what `rows` makes of tokens, `[V, N, n]`.

    `rows` only lays channels out anew. Raises StateError where there are no tokens.
    """
    count, total, product = 0, None, None
    for chunk in states.chunks():
        wide = rows(chunk.double())
        count += chunk.shape[0]
        total = chunk.double().sum(0) + (0 if total is None else total)
        product = wide.mT @ wide + (0 if product is None else product)
    if total is None or product is None or not count:
        raise StateError("there are no tokens to learn from")
    mean = total / count
    middle = rows(mean.unsqueeze(0))
    return mean, product / count - middle.mT @ middle


def _of_chunk(x: torch.Tensor) -> Moments:
    variance, mean = torch.var_mean(x, 0, correction=0)
    return Moments(len(x), mean, variance, x.abs().amax(0))
