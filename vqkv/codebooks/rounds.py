"""Rounds of assignment and update in which an update may do harm: the best codewords are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from vqkv.codebooks.assignment import step_for
from vqkv.codebooks.base import Health, last_gain, usage_entropy
from vqkv.codebooks.statistics import Statistics

#: Codewords `[M, K, d]`, what their samples sum up to, and the inertia of all rounds so far, to new
#: codewords.
Update = Callable[[torch.Tensor, Statistics, list[float]], torch.Tensor]


def best_of_rounds(
    samples: torch.Tensor,
    weights: torch.Tensor | None,
    start: torch.Tensor,
    updates: Iterable[Update],
) -> tuple[torch.Tensor, Health]:
    """The codewords `[M, K, d]` of least inertia by nearest assignment, start and end included.

    Under `torch.distributed` statistics are those of all ranks, so all keep the same.
    """
    step = step_for("auto", samples.device)
    inertia: list[float] = []
    dead = 0
    current = best = start
    found = step(samples, current, weights).all_reduced()
    kept = found
    for update in [*updates, None]:
        inertia.append(found.mean_inertia)
        dead += int(found.dead.sum())
        if inertia[-1] <= min(inertia):
            best, kept = current, found
        if update is not None:
            current = update(current, found, inertia)
            found = step(samples, current, weights).all_reduced()
    return best, Health(
        inertia=(*inertia, kept.mean_inertia),
        entropy=usage_entropy(kept.counts),
        dead_before=dead,
        dead_after=int(kept.dead.sum()),
        last_gain=last_gain(inertia),
    )
