"""k-means: Lloyd's iterations from K samples. In one dimension this is Lloyd–Max."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from vqkv.codebooks.assignment import Backend, sklearn_lloyd, step_for
from vqkv.codebooks.base import (
    CodebookLearner,
    Health,
    check_finite,
    check_samples,
    last_gain,
    usage_entropy,
)
from vqkv.codebooks.revival import split_fullest
from vqkv.codebooks.starts import plus_plus, random_samples
from vqkv.codebooks.statistics import Statistics, distributed, from_first_rank
from vqkv.errors import StateError
from vqkv.registry import Config

_STARTS = {"random": random_samples, "kmeans++": plus_plus}


class KMeansConfig(Config):
    """Settings of `KMeans`.

    From the same start the backends `native`, `torch` and `faiss` agree on the final inertia
    within 0.1 %, and with `sklearn` within 1 %. `auto` is `native` on CPUs where the package was
    compiled, else `torch`. `sklearn` replaces dead codewords in its own way, whatever `revive`.
    """

    type: Literal["kmeans"] = "kmeans"
    iterations: int = Field(default=20, ge=1)
    init: Literal["random", "kmeans++"] = "kmeans++"
    backend: Backend = "auto"
    revive: bool = True


class KMeans(CodebookLearner):
    """Minimises `Σ_i w_i min_k ‖x_i − c_k‖²` in each subspace by Lloyd's iterations.

    The health's inertia runs from the start to the final codewords, `iterations + 1` values that
    never rise; `sklearn` tells the last one only.

    Where `torch.distributed` is initialised every rank fits its own samples, statistics are
    summed over ranks, and all ranks end with the same codewords: those that one process would
    have learned from all samples and the same start. Rank 0 draws the start.

    After `fit`, `statistics_` are those of the samples under the final codewords.
    """

    Config = KMeansConfig
    config: KMeansConfig
    statistics_: Statistics

    def fit(
        self,
        samples: torch.Tensor,
        codewords: int,
        weights: torch.Tensor | None = None,
        *,
        seed: int = 0,
        init: torch.Tensor | None = None,
    ) -> KMeans:
        """As every learner's `fit`; `init` `[M, K, d]` are codewords to start from.

        Raises:
            StateError: wrong shape, NaN or infinity, or fewer samples than codewords.
            KernelError: the backend cannot run here.
        """
        samples, weights = check_samples(samples, codewords, weights)
        if init is None:
            init = self._start(samples, codewords, weights, seed)
        else:
            expected = [samples.shape[1], codewords, samples.shape[2]]
            if list(init.shape) != expected:
                raise StateError(f"init has shape [M, K, d] = {expected}, given {list(init.shape)}")
            check_finite(init, "init", "[M, K, d]")
        self.codewords_, self.health_ = self._lloyd(samples, init.to(samples), weights, seed)
        return self

    def check_runs(self, device: torch.device) -> None:
        """Raises KernelError where the backend cannot run."""
        step_for(self.config.backend, device)

    def partial_fit(
        self,
        samples: torch.Tensor,
        codewords: int,
        weights: torch.Tensor | None = None,
        *,
        seed: int = 0,
    ) -> KMeans:
        """Learn from a stream, batch by batch (mini-batch k-means, Sculley 2010).

        The first batch is fitted as by `fit`. Each later one is assigned once, its statistics
        join those of all batches so far, and codewords move to the merged means. A batch's health
        is its inertia before that move, added to those of earlier batches.

        Raises:
            StateError: as `fit`, or another M, K or d than the batches before.
        """
        if not hasattr(self, "statistics_"):
            return self.fit(samples, codewords, weights, seed=seed)
        samples, weights = check_samples(samples, 1, weights)
        current = self.codewords_[:, 0]
        given = [samples.shape[1], codewords, samples.shape[2]]
        if list(current.shape) != given:
            raise StateError(f"the stream has M, K, d = {list(current.shape)}, given {given}")
        step = step_for(self.config.backend, samples.device)
        batch = step(samples, current, weights).all_reduced()
        self.statistics_ = self.statistics_ + batch
        generator = torch.Generator().manual_seed(seed + len(self.health_[0].inertia))
        moved = self._moved(current, self.statistics_, generator)
        self.codewords_ = moved.unsqueeze(1)
        before = self.health_[0]
        dead = int(self.statistics_.dead.sum())
        self.health_ = [
            Health(
                (*before.inertia, batch.mean_inertia),
                usage_entropy(self.statistics_.counts),
                before.dead_before + dead,
                dead,
            )
        ]
        return self

    def _learn(
        self, samples: torch.Tensor, codewords: int, weights: torch.Tensor | None, seed: int
    ) -> tuple[torch.Tensor, list[Health]]:
        start = self._start(samples, codewords, weights, seed)
        return self._lloyd(samples, start, weights, seed)

    def _start(
        self, samples: torch.Tensor, codewords: int, weights: torch.Tensor | None, seed: int
    ) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return _STARTS[self.config.init](samples, codewords, weights, generator)

    def _lloyd(
        self,
        samples: torch.Tensor,
        start: torch.Tensor,
        weights: torch.Tensor | None,
        seed: int,
    ) -> tuple[torch.Tensor, list[Health]]:
        step = step_for(self.config.backend, samples.device)
        codewords = from_first_rank(start).contiguous()
        inertia: list[float] = []
        dead = 0
        if self.config.backend == "sklearn":
            if distributed():
                raise StateError("the k-means backend 'sklearn' cannot merge ranks: use 'torch'")
            codewords = sklearn_lloyd(samples, codewords, weights, self.config.iterations)
        else:
            generator = torch.Generator().manual_seed(seed)
            for _ in range(self.config.iterations):
                statistics = step(samples, codewords, weights).all_reduced()
                inertia.append(statistics.mean_inertia)
                dead += int(statistics.dead.sum())
                codewords = self._moved(codewords, statistics, generator)
        self.statistics_ = step(samples, codewords, weights).all_reduced()
        health = Health(
            inertia=(*inertia, self.statistics_.mean_inertia),
            entropy=usage_entropy(self.statistics_.counts),
            dead_before=dead,
            dead_after=int(self.statistics_.dead.sum()),
            last_gain=last_gain([*inertia, self.statistics_.mean_inertia]),
        )
        return codewords.unsqueeze(1), [health]

    def _moved(
        self, codewords: torch.Tensor, statistics: Statistics, generator: torch.Generator
    ) -> torch.Tensor:
        """Codewords after Lloyd's update, the dead ones revived."""
        codewords = statistics.means(codewords)
        dead = statistics.dead
        if not self.config.revive or not bool(dead.any()):
            return codewords
        error = statistics.inertia / statistics.counts.sum(1)
        return split_fullest(codewords, statistics.counts, error, dead, generator)[0]
