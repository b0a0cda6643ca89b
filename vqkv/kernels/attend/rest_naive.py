"""What follows attention on codes, in torch."""

from __future__ import annotations

import torch

from vqkv.kernels.attend.codes import Partial
from vqkv.kernels.attend.rest import Rest
from vqkv.kernels.select import Kernel


def attend_rest(query: torch.Tensor, partial: Partial, rest: Rest) -> torch.Tensor:
    """One softmax; scores are put side by side, as they are small, states stay where they are."""
    heads = len(rest.output_map)
    means = partial.output
    if partial.key_mean is not None:
        means = torch.cat([means, partial.key_mean], 3)
    # Not by einops, which takes longer than the products of a decoding step do.
    batch, queries, length, channels = means.shape
    coded = means.reshape(batch, heads, queries // heads * length, channels) @ rest.output_map
    if rest.output_bias is not None:
        coded += rest.output_bias[:, None]

    exact = [
        (keys.float().flatten(0, 1), values.float().flatten(0, 1))
        for keys, values in (rest.sinks, rest.tail)
    ]
    rows = query.reshape(batch * heads, -1, query.shape[3])
    lse = partial.lse.reshape(batch * heads, -1, 1)
    scores = torch.cat([lse, *(rows @ keys.mT for keys, _ in exact)], 2)
    if rest.hidden is not None:
        by_query = scores.view(batch, queries, length, -1)
        by_query[..., 1:].masked_fill_(rest.hidden, -torch.inf)
    weights = scores.softmax(2)
    if rest.hidden is not None:
        weights = weights.nan_to_num(0.0)  # rows that see no token
    output = weights[..., :1] * coded.reshape(rows.shape)
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
