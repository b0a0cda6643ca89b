"""EMA: codewords follow exponential moving averages of the samples that use them.

van den Oord, Vinyals, Kavukcuoglu (2017), appendix A.1; for KV caches RVQ (arXiv 2410.15704).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field

from vqkv.codebooks.assignment import step_for
from vqkv.codebooks.base import CodebookLearner, Health, check_samples, usage_entropy
from vqkv.codebooks.kmeans import KMeans
from vqkv.codebooks.revival import split_fullest
from vqkv.codebooks.statistics import Statistics, from_first_rank
from vqkv.errors import StateError
from vqkv.registry import Config

#: A codeword is dead when its average count sinks below this part of an equal share.
DEAD_SHARE = 0.01


class EMAConfig(Config):
    """Settings of `EMA`; the defaults are the RVQ paper's, at the steps where it goes flat."""

    type: Literal["ema"] = "ema"
    decay: float = Field(default=0.99, gt=0, lt=1)
    epsilon: float = Field(default=1e-5, gt=0)
    steps: int = Field(default=50, ge=1)
    batch: int = Field(default=65536, ge=1)
    init_iterations: int = Field(default=20, ge=1)
    init_samples: int = Field(default=100_000, ge=1)
    clip: float | None = Field(default=100.0, gt=0)
    revive: bool = True


class EMA(CodebookLearner):
    """Moving averages of counts `n` and sums `s`, `γ` being the decay, over batches of samples:

    `n ← γ n + (1 − γ) n_batch`, `s ← γ s + (1 − γ) s_batch`, `c = s / ñ`, with Laplace-smoothed
    `ñ_k = (n_k + ε) / (Σn + K ε) · Σn`.

    k-means on some samples gives the start. Values are clipped to `±clip`. `batch` vectors make a
    step, drawn from all samples in turn; their inertia is the health's, and the last value that
    of all samples under the final codewords. Under `torch.distributed` every rank brings its own
    batches, and all ranks end with the same codewords.

    After `fit`, `averages_` holds `n` and `s`.
    """

    Config = EMAConfig
    config: EMAConfig
    averages_: Statistics

    def partial_fit(
        self,
        samples: torch.Tensor,
        codewords: int,
        weights: torch.Tensor | None = None,
        *,
        seed: int = 0,
    ) -> EMA:
        """Learn from a stream: the first batch gives the start, and every batch is one step.

        Health's inertia has one value per batch, before its step.

        Raises:
            StateError: as `fit`, or another M, K or d than the batches before.
        """
        started = hasattr(self, "averages_")
        samples, weights = check_samples(samples, 1 if started else codewords, weights)
        samples = self._clipped(samples)
        given = [samples.shape[1], codewords, samples.shape[2]]
        before: tuple[float, ...] = ()
        if started:
            current = self.codewords_[:, 0]
            if list(current.shape) != given:
                raise StateError(f"the stream has M, K, d = {list(current.shape)}, given {given}")
            before = self.health_[0].inertia
        else:
            current = self._start(samples, codewords, weights, seed)
        generator = torch.Generator().manual_seed(seed + len(before))
        current, batch, dead = self._step(samples, current, weights, generator)
        self.codewords_ = current.unsqueeze(1)
        earlier = self.health_[0].dead_before if started else 0
        self.health_ = [
            Health(
                (*before, batch.mean_inertia),
                usage_entropy(self.averages_.counts),
                earlier + dead,
                int(batch.dead.sum()),
            )
        ]
        return self

    def _learn(
        self, samples: torch.Tensor, codewords: int, weights: torch.Tensor | None, seed: int
    ) -> tuple[torch.Tensor, list[Health]]:
        samples = self._clipped(samples)
        generator = torch.Generator().manual_seed(seed)
        current = self._start(samples, codewords, weights, seed)
        inertia: list[float] = []
        dead = 0
        for chosen in self._batches(samples.shape[0], generator):
            chosen = chosen.to(samples.device)
            weight = None if weights is None else weights[chosen]
            current, batch, fallen = self._step(samples[chosen], current, weight, generator)
            inertia.append(batch.mean_inertia)
            dead += fallen
        final = step_for("auto", samples.device)(samples, current, weights).all_reduced()
        health = Health(
            inertia=(*inertia, final.mean_inertia),
            entropy=usage_entropy(final.counts),
            dead_before=dead,
            dead_after=int(final.dead.sum()),
        )
        return current.unsqueeze(1), [health]

    def _start(
        self, samples: torch.Tensor, codewords: int, weights: torch.Tensor | None, seed: int
    ) -> torch.Tensor:
        """k-means on some samples, whose statistics start the averages."""
        count = max(self.config.init_samples, codewords)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(samples.shape[0], generator=generator)[:count].to(samples.device)
        learner = KMeans(iterations=self.config.init_iterations, revive=self.config.revive)
        weight = None if weights is None else weights[chosen]
        learner.fit(samples[chosen], codewords, weight, seed=seed)
        # Averages count samples of a batch, whatever the number that the start was learned from.
        per_step = torch.tensor(min(self.config.batch, samples.shape[0]) / chosen.shape[0])
        per_step = from_first_rank(per_step.to(samples.device))
        self.averages_ = learner.statistics_.scaled(float(per_step))
        return learner.codewords_[:, 0]

    def _step(
        self,
        samples: torch.Tensor,
        codewords: torch.Tensor,
        weights: torch.Tensor | None,
        generator: torch.Generator,
    ) -> tuple[torch.Tensor, Statistics, int]:
        """Codewords after one batch, the batch's statistics, and how many codewords had died."""
        decay = self.config.decay
        batch = step_for("auto", samples.device)(samples, codewords, weights).all_reduced()
        averages = self.averages_.scaled(decay) + batch.scaled(1 - decay)
        codewords = self._codewords(averages)
        share = averages.counts.sum(1, keepdim=True) / codewords.shape[1]
        dead = averages.counts < DEAD_SHARE * share
        if self.config.revive and bool(dead.any()):
            error = batch.inertia / batch.counts.sum(1)
            codewords, donor = split_fullest(codewords, averages.counts, error, dead, generator)
            averages = _halved(averages, codewords, donor)
        self.averages_ = averages
        return codewords, batch, int(dead.sum())

    def _codewords(self, averages: Statistics) -> torch.Tensor:
        counts = averages.counts
        total = counts.sum(1, keepdim=True)
        epsilon = self.config.epsilon
        smoothed = (counts + epsilon) / (total + counts.shape[1] * epsilon) * total
        return (averages.sums / smoothed.unsqueeze(-1)).float()

    def _batches(self, samples: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
        """Indices of each step's samples: shuffled passes over all, cut into batches."""
        size = min(self.config.batch, samples)
        order = torch.empty(0, dtype=torch.long)
        for _ in range(self.config.steps):
            if order.shape[0] < size:
                order = torch.randperm(samples, generator=generator)
            yield order[:size]
            order = order[size:]

    def _clipped(self, samples: torch.Tensor) -> torch.Tensor:
        clip = self.config.clip
        return samples if clip is None else samples.clamp(-clip, clip)


def _halved(averages: Statistics, codewords: torch.Tensor, donor: torch.Tensor) -> Statistics:
    """Averages in which a revived codeword and the one that it was split from share the count."""
    own = torch.arange(donor.shape[1], device=donor.device).expand_as(donor)
    revived = donor != own
    shares = torch.ones_like(averages.counts).scatter_add(1, donor, revived.double())
    counts = (averages.counts / shares).gather(1, donor)
    moved = revived | (shares > 1)
    sums = torch.where(moved.unsqueeze(-1), codewords * counts.unsqueeze(-1), averages.sums)
    return Statistics(sums, counts, averages.inertia)
