"""What follows attention on codes: its output as the head's channels, merged with exact tokens.

Coded tokens are one more entry of the softmax over the exact ones: its score is their log-sum-exp,
its value their output, mapped back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vqkv.errors import KernelError
from vqkv.kernels.attend.codes import Partial
from vqkv.kernels.select import select


class Rest(NamedTuple):
    """What a layer holds beside its codes.

    Attributes:
        output_map: `[H, D, D]`: means of coded values to the output; `[H, 2 D, D]` where means of
            coded keys follow those of values.
        output_bias: `[H, D]`, added by it; None where there is none.
        sinks: exact tokens before the coded ones, keys after RoPE and values `[B, H, n, D]`.
        tail: exact tokens after them.
        hidden: of sinks, then tail, those that a query does not see, `[B, Q or 1, t, n of both]`
            (bool); None where each query sees all of them.
        null_scores: `[Q]`, a learned score of each query head that takes part in its softmax and
            has no value (GPT-OSS calls it a sink); None where there are none.
    """

    output_map: torch.Tensor
    output_bias: torch.Tensor | None
    sinks: tuple[torch.Tensor, torch.Tensor]
    tail: tuple[torch.Tensor, torch.Tensor]
    hidden: torch.Tensor | None = None
    null_scores: torch.Tensor | None = None

    def null_by_row(self, length: int) -> torch.Tensor | None:
        """Null scores `[H, R]` (fp32) of a KV head's rows, which are t queries of each head."""
        if self.null_scores is None:
            return None
        by_head = self.null_scores.float().view(len(self.output_map), -1, 1)
        return by_head.expand(-1, -1, length).flatten(1)


def attend_rest(query: torch.Tensor, partial: Partial, rest: Rest) -> torch.Tensor:
    """Attention `[B, Q, t, D]` (fp32) of scaled queries `[B, Q, t, D]` over all tokens of a layer.

    Queries are in the head's channels, `partial.lse` is of whole scores. A row that sees no token
    is zero; without `hidden` there is one, as a query sees itself. As in attention on codes,
    compiled kernels give no gradients.

    Raises:
        KernelError: arguments that do not fit each other.
    """
    check(query, partial, rest)
    return attend_rest_unchecked(query, partial, rest)


def attend_rest_unchecked(query: torch.Tensor, partial: Partial, rest: Rest) -> torch.Tensor:
    """`attend_rest` of arguments that are known to fit each other.

    A decoding step comes by once a layer, so what checks would find nothing in goes without.
    """
    kernel = select("attend_rest", state_type(rest), query.device).kernel
    output: torch.Tensor = kernel(query, partial, rest)
    return output


def state_type(rest: Rest) -> torch.dtype:
    """What kernels read exact states as: fp32 where they differ, as under autocast."""
    first = rest.sinks[0].dtype
    same = all(states.dtype is first for states in (rest.sinks[1], *rest.tail))
    return first if same else torch.float32


def check(query: torch.Tensor, partial: Partial, rest: Rest) -> None:
    """Raises KernelError where shapes, types or devices do not fit each other."""
    batch, queries, length, head_dim = query.shape
    heads = rest.output_map.shape[0]
    sums = 1 if partial.key_mean is None else 2
    counts = rest.sinks[0].shape[2], rest.tail[0].shape[2]
    hidden_of_all = rest.hidden
    if hidden_of_all is not None and hidden_of_all.ndim == 4 and hidden_of_all.shape[1] == 1:
        hidden_of_all = hidden_of_all.expand(-1, queries, -1, -1)
    fits = (
        ("outputs", partial.output, query.shape),
        ("log-sum-exps", partial.lse, query.shape[:3]),
        ("means of keys", partial.key_mean, query.shape),
        ("the map", rest.output_map, (heads, sums * head_dim, head_dim)),
        ("its bias", rest.output_bias, (heads, head_dim)),
        ("keys of sinks", rest.sinks[0], (batch, heads, counts[0], head_dim)),
        ("values of sinks", rest.sinks[1], (batch, heads, counts[0], head_dim)),
        ("keys of the tail", rest.tail[0], (batch, heads, counts[1], head_dim)),
        ("values of the tail", rest.tail[1], (batch, heads, counts[1], head_dim)),
        ("the mask by query head", hidden_of_all, (batch, queries, length, sum(counts))),
        ("null scores", rest.null_scores, (queries,)),
    )
    for name, tensor, shape in fits:
        if tensor is not None and tensor.shape != shape:
            raise KernelError(f"{name}: {list(shape)} expected, given {list(tensor.shape)}")
        if tensor is not None and tensor.device != query.device:
            raise KernelError(f"{name}: on {tensor.device}, queries are on {query.device}")
    if queries % heads:
        raise KernelError(f"{queries} query heads do not share {heads} KV heads evenly")
    if rest.hidden is not None and rest.hidden.dtype != torch.bool:
        raise KernelError(f"hidden is bool, given {rest.hidden.dtype}")
