"""Scores of next-token predictions, exact and compressed side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

#: Rows of logits turned into probabilities at a time, few enough to stay in a CPU's caches.
ROWS = 16

#: Consecutive tokens that the bootstrap draws together, since neighbours' losses are alike.
BLOCK = 64
RESAMPLES = 1000


@dataclass(frozen=True)
class Scores:
    """Per scored token, `[T]` in fp64: losses of both arms in nats, KL, and top-1 agreement."""

    exact: torch.Tensor
    compressed: torch.Tensor
    kl: torch.Tensor
    agree: torch.Tensor

    @classmethod
    def joined(cls, parts: Iterable[Scores]) -> Scores:
        """The tokens of several parts, in order."""
        columns = zip(*((p.exact, p.compressed, p.kl, p.agree) for p in parts), strict=True)
        return cls(*(torch.cat(column) for column in columns))

    @property
    def perplexity_exact(self) -> float:
        """Of the exact model."""
        return math.exp(float(self.exact.mean()))

    @property
    def perplexity(self) -> float:
        """Through the compressed cache."""
        return math.exp(min(float(self.compressed.mean()), 700.0))  # below fp64's overflow

    @property
    def log_ratio(self) -> float:
        """Log of the perplexity ratio: the mean loss difference."""
        return float((self.compressed - self.exact).mean())

    def interval(self, seed: int = 0) -> tuple[float, float]:
        """95 % of a paired bootstrap of `log_ratio` over blocks of consecutive tokens."""
        blocks = (self.compressed - self.exact).split(BLOCK)
        sums = torch.stack([block.sum() for block in blocks])
        sizes = torch.tensor([len(block) for block in blocks], dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(blocks), (RESAMPLES, len(blocks)), generator=generator)
        means = sums[drawn].sum(1) / sizes[drawn].sum(1)
        low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64))
        return float(low), float(high)


def score(exact: torch.Tensor, compressed: torch.Tensor, targets: torch.Tensor) -> Scores:
    """Compare logits `[T, vocabulary]` of both arms at the tokens `[T]` that came next."""
    parts = []
    for start in range(0, len(targets), ROWS):
        rows = slice(start, start + ROWS)
        p = torch.log_softmax(exact[rows].float(), -1)
        q = torch.log_softmax(compressed[rows].float(), -1)
        target = targets[rows, None]
        parts.append(
            Scores(
                -p.gather(1, target)[:, 0].double(),
                -q.gather(1, target)[:, 0].double(),
                (p.exp() * (p - q)).sum(1).double(),
                (p.argmax(1) == q.argmax(1)).double(),
            )
        )
    return Scores.joined(parts)
