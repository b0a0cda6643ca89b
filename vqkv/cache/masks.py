"""Masks of transformers' attention implementations, in one form."""

from __future__ import annotations

import torch


def visible_slots(
    mask: torch.Tensor | None, queries: int, slots: int, device: torch.device
) -> torch.Tensor:
    """Which of the last `queries` slots sees which slot, bool `[B or 1, Q or 1, t, T]`.

    Args:
        mask: `[B, Q or 1, t, T]`, bool or added to scores; or `[B, T]`, of padding alone.
        queries: t.
        slots: T.
        device: of the queries.
    """
    if mask is not None and mask.ndim == 4:
        return mask if mask.dtype == torch.bool else mask == 0
    # Mask functions leave out plain causal masks, or leave them to the kernel beside padding.
    last = torch.arange(slots - queries, slots, device=device)
    causal = (torch.arange(slots, device=device) <= last[:, None])[None, None]
    return causal if mask is None else causal & mask[:, None, None].bool()
