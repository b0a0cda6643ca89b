"""What a compressed cache costs in quality: all that is scored on one text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vqkv.evaluation.arms import Arms
from vqkv.evaluation.canary import Canary, run_canary
from vqkv.evaluation.passages import RepeatedPassages, repeated_passages
from vqkv.evaluation.scoring import Scores

#: Called with a phase, what is done of it, and of what.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Quality:
    """Scores of all windows, the canary where there was one, and repeated passages."""

    scores: Scores
    canary: Canary | None
    repeated: RepeatedPassages

    def figures(self) -> dict[str, Any]:
        """As fields of `Evaluation`."""
        scores = self.scores
        return {
            "tokens": len(scores.exact),
            "kl": float(scores.kl.mean()),
            "perplexity": scores.perplexity,
            "perplexity_exact": scores.perplexity_exact,
            "ratio": scores.perplexity / scores.perplexity_exact,
            "interval": scores.interval(),
            "top1_agreement": float(scores.agree.mean()),
            "repeated_passage": self.repeated.compressed,
            "repeated_passage_exact": self.repeated.exact,
            "canary_perplexity": None if self.canary is None else self.canary.perplexity,
            "canary_ok": None if self.canary is None else self.canary.ok,
        }


def measure(
    arms: Arms,
    destroying: Arms | None,
    windows: Sequence[torch.Tensor],
    *,
    passages: int,
    passage_lengths: tuple[int, ...],
    progress: Progress,
) -> Quality:
    """Score windows `[T]`, the canary, and passages of their tokens.

    Args:
        arms: to score with.
        destroying: the same with destroyed codes, for the canary; None for no canary.
        windows: of token ids.
        passages: repeated passages of each length; 0 for none.
        passage_lengths: in tokens.
        progress: told of each window and passage, and of the canary.
    """
    parts = []
    for done, window in enumerate(windows, start=1):
        if len(window) > 1:
            parts.append(arms.scores(window))
        progress("score", done, len(windows))
    scores = Scores.joined(parts)
    canary = None
    if destroying is not None:
        progress("canary", 0, 1)
        canary = run_canary(destroying, windows[0])
        progress("canary", 1, 1)
    repeated = (
        repeated_passages(
            arms,
            torch.cat(list(windows)),
            passage_lengths,
            passages,
            lambda done, total: progress("repeated passages", done, total),
        )
        if passages
        else RepeatedPassages()
    )
    return Quality(scores, canary, repeated)
