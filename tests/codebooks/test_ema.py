from __future__ import annotations

import pytest
import torch

from vqkv.codebooks.ema import EMA
from vqkv.codebooks.kmeans import KMeans
from vqkv.errors import StateError

from .data import inertia, mixture


def test_steps_follow_the_papers_equations() -> None:
    """Whole-batch steps against the update written out by loops in fp64."""
    x = mixture(400, 2, 3)
    decay, epsilon, size, steps = 0.9, 0.01, 8, 4
    order = torch.randperm(400, generator=torch.Generator().manual_seed(5))
    start = KMeans(iterations=2).fit(x[order], size, seed=5)
    learner = EMA(decay=decay, epsilon=epsilon, steps=steps, init_iterations=2, revive=False)
    learner.fit(x, size, seed=5)
    for m in range(2):
        samples, codewords = x[:, m].double(), start.codewords_[m, 0].double()
        counts, sums = start.statistics_.counts[m], start.statistics_.sums[m]
        for _ in range(steps):
            used = torch.eye(size, dtype=torch.float64)[torch.cdist(samples, codewords).argmin(1)]
            counts = decay * counts + (1 - decay) * used.sum(0)
            sums = decay * sums + (1 - decay) * used.T @ samples
            total = counts.sum()
            smoothed = (counts + epsilon) / (total + size * epsilon) * total
            codewords = sums / smoothed[:, None]
        torch.testing.assert_close(
            learner.codewords_[m, 0].double(), codewords, rtol=1e-4, atol=1e-4
        )


def test_small_batches_come_close_to_k_means() -> None:
    x = torch.randn(4000, 3, 4, generator=torch.Generator().manual_seed(0))
    learner = EMA(steps=60, batch=500, init_samples=500, decay=0.9).fit(x, 32)
    start = KMeans().fit(x[:500], 32)
    best = KMeans().fit(x, 32)
    error = inertia(x, learner.codewords_[:, 0])
    assert learner.health_[0].inertia[-1] == pytest.approx(error, rel=1e-5)
    assert len(learner.health_[0].inertia) == 60 + 1
    assert error < inertia(x, start.codewords_[:, 0])
    assert error < 1.05 * inertia(x, best.codewords_[:, 0])


def test_a_stream_follows_a_drift() -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 2000, 2, 4, generator=generator)
    after = after + 5
    learner = EMA(decay=0.5)
    learner.partial_fit(before, 16)
    lost = inertia(after, learner.codewords_[:, 0])
    for _ in range(20):
        learner.partial_fit(after, 16)
    assert inertia(after, learner.codewords_[:, 0]) < 0.05 * lost
    assert len(learner.health_[0].inertia) == 21


def test_codewords_that_fall_out_of_use_are_revived() -> None:
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(1000, 1, 2, generator=generator)
    both[:500] += 20
    left = both[:500]  # half of the codewords lose their samples
    errors, dead = {}, {}
    for revive in (False, True):
        learner = EMA(decay=0.5, revive=revive).partial_fit(both, 32)
        for _ in range(30):
            learner.partial_fit(left, 32)
            averages = learner.averages_
            means = averages.sums / averages.counts.unsqueeze(-1)
            if revive:  # a split shares out the averages too, or the next step would undo it
                torch.testing.assert_close(
                    means, learner.codewords_[:, 0].double(), rtol=1e-2, atol=0.1
                )
        errors[revive] = inertia(left, learner.codewords_[:, 0])
        dead[revive] = learner.health_[0].dead_after
    assert dead[True] < dead[False] / 2
    assert errors[True] < 0.7 * errors[False]


def test_values_are_clipped() -> None:
    x = mixture(400, 2, 3)
    x[0] = 1e4
    assert float(EMA(steps=3, clip=2.0).fit(x, 16).codewords_.abs().max()) <= 2.01
    assert float(EMA(steps=3, clip=None).fit(x, 16).codewords_.abs().max()) > 5e3


def test_weight_zero_is_no_sample() -> None:
    x = mixture(400, 2, 3)
    x[::2] += 1e3
    weights = torch.ones(400)
    weights[::2] = 0
    learner = EMA(steps=5, clip=None).fit(x, 8, weights)
    assert float(learner.codewords_.abs().max()) < 500


def test_same_seed_same_codewords() -> None:
    x = mixture(400, 2, 4)
    first, again, other = (EMA(steps=5, batch=100).fit(x, 16, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.codewords_, again.codewords_)
    assert not torch.equal(first.codewords_, other.codewords_)


def test_bad_samples() -> None:
    with pytest.raises(StateError, match="32 codewords need at least as many samples, given 20"):
        EMA().fit(mixture(20, 2, 4), 32)
    learner = EMA().partial_fit(mixture(50, 2, 4), 32).partial_fit(mixture(5, 2, 4), 32)
    with pytest.raises(StateError, match=r"M, K, d = \[2, 32, 4\], given \[2, 32, 2\]"):
        learner.partial_fit(mixture(50, 2, 2), 32)
