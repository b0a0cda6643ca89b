"""The attention function that reads codes, and its mask function, for transformers to find."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vqkv.cache.layer import CodedStates, VQLayer
from vqkv.errors import KernelError
from vqkv.kernels.attend import Block, attend

#: The name under which transformers finds it.
NAME = "vqkv"

#: Slots decoded at a time.
BLOCK_TOKENS = 1024


def register() -> None:
    """Make the function known to transformers, mask included. Repeating it changes nothing."""
    AttentionInterface.register(NAME, coded_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def coded_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: Any,
    value: Any,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention `[B, t, Q, D]` of queries `[B, Q, t, D]`; anything but codes goes to SDPA.

    Raises:
        KernelError: the model asks for a variant of attention that no kernel here computes.
    """
    if not isinstance(key, CodedStates):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    for variant in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(variant) is not None:
            raise KernelError(
                f"{type(module).__name__} uses {variant}, which attention on codes does not "
                "compute: use read='decode'"
            )
    layer = key.layer
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    visible = _visible(attention_mask, query.shape[2], layer.get_seq_length(), query.device)
    output = attend(query, _blocks(layer, visible), scale, layer.key_codec.layout)
    layer.release()
    return output.transpose(1, 2).contiguous(), None


def _visible(
    mask: torch.Tensor | None, queries: int, slots: int, device: torch.device
) -> torch.Tensor:
    """Which of the last `queries` slots sees which slot, bool `[.., t, T]`."""
    if mask is None:  # the mask function leaves out plain causal masks
        last = torch.arange(slots - queries, slots, device=device)
        return torch.arange(slots, device=device) <= last[:, None]
    return mask if mask.dtype == torch.bool else mask == 0


def _blocks(layer: VQLayer, visible: torch.Tensor) -> Iterator[Block]:
    """All slots in runs: coded ones decoded a block at a time, then what is exact in every row."""
    slots, exact = layer.get_seq_length(), layer.tail_start
    edges = [*range(0, exact, BLOCK_TOKENS), exact, slots]
    for start, stop in pairwise(edges):
        if start < stop:
            yield Block(*layer.read(start, stop), visible[..., start:stop])
