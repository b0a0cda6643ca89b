"""Repeated passages: the loss on the second copy of a passage, which only retrieval keeps low."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from vqkv.attention import most_positions
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
    the text is shorter than a passage. Where the text has fewer places to start from than
    `count`, each is taken once, and a note says how many there are.
    """
    found = RepeatedPassages()
    limit = most_positions(arms.model.config)
    starts: dict[int, list[int]] = {}
    for length in lengths if count else ():
        if limit is not None and 2 * length > limit:
            found.notes.append(f"passages of {length}: two copies exceed {limit} positions")
        elif len(tokens) < length:
            found.notes.append(f"passages of {length}: the text has {len(tokens)} tokens left")
        else:
            starts[length] = _spread(len(tokens) - length, count)
            if len(starts[length]) < count:
                found.notes.append(
                    f"passages of {length}: {len(starts[length])} of {count}, the text has only "
                    f"{len(tokens)} tokens"
                )
    total, done = sum(map(len, starts.values())), 0
    for length, places in starts.items():
        exact, compressed = [], []
        for start in places:
            passage = tokens[start : start + length]
            scores = arms.scores(torch.cat([passage, passage]), first=length)
            exact.append(float(scores.exact.mean()))
            compressed.append(float(scores.compressed.mean()))
            done += 1
            report(done, total)
        found.exact[length] = sum(exact) / len(exact)
        found.compressed[length] = sum(compressed) / len(compressed)
    return found


def _spread(last: int, count: int) -> list[int]:
    """At most `count` different starts from 0 to `last`, both among them, evenly apart."""
    count = min(count, last + 1)
    return [index * last // max(1, count - 1) for index in range(count)]
