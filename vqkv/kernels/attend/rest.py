"""What follows attention on codes: its output as the head's channels, merged with exact tokens.

Coded tokens are one more entry of the softmax over the exact ones: its score is their log-sum-exp,
its value their output, mapped back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

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
    """

    output_map: torch.Tensor
    output_bias: torch.Tensor | None
    sinks: tuple[torch.Tensor, torch.Tensor]
    tail: tuple[torch.Tensor, torch.Tensor]
    hidden: torch.Tensor | None = None


def attend_rest(query: torch.Tensor, partial: Partial, rest: Rest) -> torch.Tensor:
    """Attention `[B, Q, t, D]` (fp32) of scaled queries `[B, Q, t, D]` over all tokens of a layer.

    Queries are in the head's channels, `partial.lse` is of whole scores. A row that sees no token
    is zero.
    """
    kernel = select("attend_rest", rest.tail[0].dtype, query.device).kernel
    output: torch.Tensor = kernel(query, partial, rest)
    return output
