"""What follows attention on codes on a GPU, in one launch."""

from __future__ import annotations

import torch

from vqkv.kernels import gpu
from vqkv.kernels.attend.codes import Partial
from vqkv.kernels.attend.rest import Rest, state_type
from vqkv.kernels.select import Kernel

TYPES = (torch.float16, torch.bfloat16, torch.float32)


def attend_rest(query: torch.Tensor, partial: Partial, rest: Rest) -> torch.Tensor:
    """Attention `[B, Q, t, D]` over a layer's coded and exact tokens.

    The output's map is taken in TF32, as sums of codewords come from products in fp16; exact states
    as they are.
    """
    from vqkv.kernels.gpu import rest_ops

    dtype = state_type(rest)
    output: torch.Tensor = rest_ops.attend_rest(
        query,
        *partial[:2],
        partial.key_mean,
        rest.output_map,
        rest.output_bias,
        *(states.to(dtype) for states in (*rest.sinks, *rest.tail)),
        rest.hidden,
        rest.null_by_row(query.shape[2]),
    )
    return output


def refuses(dtype: torch.dtype, device: torch.device) -> str | None:
    """It reads half and single precision."""
    if dtype not in TYPES:
        return f"exact states are {dtype}, it reads {', '.join(map(str, TYPES))}"
    return gpu.unavailable_reason(device)


KERNEL = Kernel(
    "attend_rest", "triton", attend_rest, refuses, speed=100, only_asked_for_on=("cpu",)
)
