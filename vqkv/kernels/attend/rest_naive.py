"""What follows attention on codes, in torch."""

from __future__ import annotations

import torch

from vqkv.kernels.attend.codes import Partial
from vqkv.kernels.attend.rest import Rest
from vqkv.kernels.select import Kernel


def attend_rest(query: torch.Tensor, partial: Partial, rest: Rest) -> torch.Tensor:
    """One softmax; scores are put side by side, as they are small, states stay where they are."""
    # Not by einops, which takes longer than the products of a decoding step do.
    batch, queries, length, head_dim = query.shape
    heads = len(rest.output_map)
    rows = queries // heads * length  # on a KV head
    means = partial.output.float()
    if partial.key_mean is not None:
        means = torch.cat([means, partial.key_mean.float()], 3)
    coded = means.reshape(batch, heads, rows, means.shape[3]) @ rest.output_map.float()
    if rest.output_bias is not None:
        coded += rest.output_bias[:, None]

    exact = [
        (keys.float().flatten(0, 1), values.float().flatten(0, 1))
        for keys, values in (rest.sinks, rest.tail)
    ]
    q = query.float().reshape(batch * heads, rows, head_dim)
    lse = partial.lse.float().reshape(batch * heads, rows, 1)
    scores = torch.cat([lse, *(q @ keys.mT for keys, _ in exact)], 2)
    if rest.hidden is not None:
        by_query = scores.view(batch, queries, length, -1)
        by_query[..., 1:].masked_fill_(rest.hidden, -torch.inf)
    null = rest.null_by_row(length)
    if null is not None:
        scores = torch.cat([scores, null.repeat(batch, 1)[..., None]], 2)
    weights = scores.softmax(2)
    if rest.hidden is not None and null is None:
        unseeing = (scores == -torch.inf).all(2, keepdim=True)
        weights = weights.masked_fill(unseeing, 0.0)
    output = weights[..., :1] * coded.flatten(0, 1)
    first = 1
    for _, values in exact:
        after = first + values.shape[1]
        output.baddbmm_(weights[..., first:after], values)
        first = after
    return output.view(query.shape)


def refuses(dtype: torch.dtype, device: torch.device) -> str | None:
    """It takes states of any type, anywhere."""
    return None


KERNEL = Kernel("attend_rest", "naive", attend_rest, refuses, speed=0)
