"""What is measured: the shape of Llama-3.1-8B, or a toy of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """One model's shape, and how far each part of the benchmark goes."""

    device: str
    layers: int
    heads: int
    group: int
    head_dim: int
    hidden: int
    inner: int
    vocabulary: int
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    most_tokens: int
    prefill: int
    matrix: int
    copy_bytes: int
    gathers: int
    #: More than any L2 cache holds; buffers are rotated until they take as much.
    cold_bytes: int
    #: Tokens of a context that are kept exact, four of them as sinks.
    exact: int
    #: Contexts and batches of a whole decode step.
    steps: tuple[tuple[int, int], ...]

    @property
    def query_heads(self) -> int:
        """Q."""
        return self.heads * self.group

    def points(self) -> list[tuple[int, int]]:
        """Contexts and batches to attend on, in the order in which they are wanted most."""
        pairs = [(context, batch) for context in self.contexts for batch in self.batches]
        return [pair for pair in pairs if pair[0] * pair[1] <= self.most_tokens]


FULL = Sizes(
    device="cuda",
    layers=32,
    heads=8,
    group=4,
    head_dim=128,
    hidden=4096,
    inner=14336,
    vocabulary=128256,
    contexts=(1 << 17, 1 << 14, 1 << 12, 1 << 11, 1 << 10, 1 << 16, 1 << 19),
    batches=(1, 4, 16, 64),
    most_tokens=1 << 22,
    prefill=1 << 17,
    matrix=8192,
    copy_bytes=1 << 32,
    gathers=1 << 28,
    cold_bytes=128 << 20,
    exact=192,  # four sinks, a window of 128, and 60 tokens that wait for a page to be full
    steps=((1 << 13, 1), (1 << 17, 1), (1 << 17, 4), (1 << 13, 32)),
)
TOY = Sizes(
    device="cpu",
    layers=1,
    heads=2,
    group=2,
    head_dim=32,
    hidden=64,
    inner=64,
    vocabulary=64,
    contexts=(70,),
    batches=(2,),
    most_tokens=140,
    prefill=20,
    matrix=16,
    copy_bytes=1 << 10,
    gathers=1 << 10,
    cold_bytes=0,
    exact=6,
    steps=((70, 1),),
)
