"""Repeated passages: the loss on the second copy of a passage, which only retrieval keeps low."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from vqkv.evaluation.arms import Arms


@dataclass
class RepeatedPassages:
    """Mean loss on the second copy, by passage length, of both arms; and what was left out."""

    compressed: dict[int, float] = field(default_factory=dict)
    exact: dict[int, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def repeated_passages(
    arms: Arms,
    tokens: torch.Tensor,
    lengths: tuple[int, ...],
    count: int,
    report: Callable[[int, int], None],
) -> RepeatedPassages:
    """Mean over `count` passages of each length, spread evenly over `tokens` `[T]`.

    A length is left out, and a note says why, where two copies exceed the model's positions or
    the text is shorter than a passage.
    """
    found = RepeatedPassages()
    limit = getattr(arms.model.config.get_text_config(), "max_position_embeddings", None)
    usable = []
    for length in lengths if count else ():
        if limit is not None and 2 * length > limit:
            found.notes.append(f"passages of {length}: two copies exceed {limit} positions")
        elif len(tokens) < length:
            found.notes.append(f"passages of {length}: the text has {len(tokens)} tokens left")
        else:
            usable.append(length)
    for index, length in enumerate(usable):
        starts = torch.linspace(0, len(tokens) - length, count).long().tolist()
        exact, compressed = [], []
        for done, start in enumerate(starts, start=1):
            passage = tokens[start : start + length]
            scores = arms.scores(torch.cat([passage, passage]), first=length)
            exact.append(float(scores.exact.mean()))
            compressed.append(float(scores.compressed.mean()))
            report(index * count + done, len(usable) * count)
        found.exact[length] = sum(exact) / count
        found.compressed[length] = sum(compressed) / count
    return found
