"""What follows attention on codes: the output mapped back, exact tokens taken in."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.coded import Scheme
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.timing import microseconds
from vqkv.kernels import using
from vqkv.kernels.attend.codes import Partial
from vqkv.kernels.attend.rest import Rest, attend_rest

SINKS = 4


def rest(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Of layers whose values are predicted from keys: ours in one launch, and torch's."""
    for batch in sizes.batches:
        query, found, given = _problem(sizes, batch)
        truth = _truth(query, found, given)
        for kernel in ("triton", "naive"):
            with using(attend_rest=kernel):
                time = microseconds([partial(attend_rest, query, found, given)])
                output = attend_rest(query, found, given)[:1, :1]
            error = float((output.double() - truth).norm() / truth.norm())
            yield {"arm": kernel, "batch": batch, "tokens": sizes.exact, "us": time, "error": error}


def kept(sizes: Sizes, scheme: Scheme, batch: int) -> Rest:
    """Random maps, and states of the exact tokens, of one layer."""
    heads, dim = sizes.heads, sizes.head_dim
    sinks, tail = (
        tuple(_random(sizes, batch, heads, count, dim).half() for _ in range(2))
        for count in (SINKS, sizes.exact - SINKS)
    )
    output_map = _random(sizes, heads, dim * (2 if scheme.key_sums else 1), dim)
    return Rest(output_map * dim**-0.5, _random(sizes, heads, dim), (*sinks,), (*tail,))


def _problem(sizes: Sizes, batch: int) -> tuple[torch.Tensor, Partial, Rest]:
    shape = (batch, sizes.query_heads, 1, sizes.head_dim)
    given = kept(sizes, Scheme(4, key_sums=True), batch)
    found = Partial(_random(sizes, *shape), _random(sizes, *shape[:3]) + 5, _random(sizes, *shape))
    return _random(sizes, *shape) * sizes.head_dim**-0.5, found, given


def _truth(query: torch.Tensor, found: Partial, given: Rest) -> torch.Tensor:
    """Of the first head of the first row, in fp64."""
    assert found.key_mean is not None and given.output_bias is not None
    sums = torch.cat([found.output, found.key_mean], 3)[:1, :1].double()
    coded = sums @ given.output_map[0].double() + given.output_bias[0].double()
    runs = zip(given.sinks, given.tail, strict=True)
    keys, values = (torch.cat(each, 2)[:1, :1].double() for each in runs)
    scores = query[:1, :1].double() @ keys.mT
    scores = torch.cat([found.lse[:1, :1, :, None].double(), scores], 3)
    return scores.softmax(3) @ torch.cat([coded, values], 2)


def _random(sizes: Sizes, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=sizes.device)
