"""What follows attention on codes as a `torch.library` custom op."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkv.kernels.gpu.configs import ROWS, RestConfig
from vqkv.kernels.gpu.rest import attend_rest as attend_rest_kernel
from vqkv.kernels.gpu.tensors import readable


@torch.library.custom_op("vqkv::attend_rest", mutates_args=(), device_types=("cuda", "cpu"))
def attend_rest(
    query: Tensor,
    means: Tensor,
    lse: Tensor,
    key_means: Tensor | None,
    output_map: Tensor,
    output_bias: Tensor | None,
    sink_keys: Tensor,
    sink_values: Tensor,
    tail_keys: Tensor,
    tail_values: Tensor,
    hidden: Tensor | None,
    null: Tensor | None,
) -> Tensor:
    """Attention `[B, Q, t, D]` (fp32), as `vqkv.kernels.attend.rest` says."""
    batch, queries, length, head_dim = query.shape
    heads = output_map.shape[0]
    rows = queries // heads * length
    output = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    if not output.numel():
        return output
    states = [_side_by_side(each) for each in (sink_keys, sink_values, tail_keys, tail_values)]
    sinks, tail = sink_keys.shape[2], tail_keys.shape[2]
    if hidden is not None:
        hidden = hidden.expand(batch, queries, length, sinks + tail).contiguous().view(torch.uint8)
    config = RestConfig(
        head_dim,
        half=states[0].element_size() == 2,
        key_sums=key_means is not None,
        bias=output_bias is not None,
        hidden=hidden is not None,
        null=null is not None,
    )
    # What a launch does not read may be any tensor.
    attend_rest_kernel[-(-rows // ROWS), heads, batch](
        _single(query),
        _single(means),
        _single(lse),
        means if key_means is None else _single(key_means),
        _single(output_map),
        output_map if output_bias is None else _single(output_bias),
        lse if hidden is None else hidden,
        lse if null is None else null,
        output,
        *(*states[:2], sinks, *states[2:], tail),
        *(stride for each in states for stride in each.stride()[:3]),
        rows,
        **config.constants(),
        **config.options(),
    )
    return output


@attend_rest.register_fake
def _(query: Tensor, *others: Tensor | None) -> Tensor:
    return query.new_empty(query.shape, dtype=torch.float32)


def _single(x: Tensor) -> Tensor:
    return x.float().contiguous()


def _side_by_side(states: Tensor) -> Tensor:
    """With channels side by side; other strides are free."""
    if states.device.type == "cpu" and states.dtype == torch.bfloat16:
        return readable(states)
    return states if states.stride(3) == 1 else states.contiguous()
