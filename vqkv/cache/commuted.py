"""What attention by tables is given of a layer: keys as codes that commute with RoPE."""

from __future__ import annotations

import torch

from vqkv.cache.layer import VQLayer
from vqkv.kernels.attend.commuted import pays
from vqkv.kernels.attend.commuting import CommutingKeys


def commuting_slots(layer: VQLayer, rows: int) -> tuple[int, int]:
    """From and up to which slot keys are handed on as codes; 0 and 0 for none.

    They are coded in every row and exact in none, and a table of `rows` queries pays for them.
    """
    layout = layer.key_codec.layout
    if not layout.commuting or layout.rope != "pre":
        return 0, 0
    bounds = list(zip(layer.pads, layer.coded, strict=True))
    low = max(pad + min(layer.sinks, coded) for pad, coded in bounds)
    high = min(pad + coded for pad, coded in bounds)
    return (low, high) if high > low and pays(layout, rows, high - low) else (0, 0)


def read_commuting(layer: VQLayer, start: int, stop: int) -> tuple[CommutingKeys, torch.Tensor]:
    """Keys of slots within `commuting_slots`, and their values `[B, H, n, D]`, decoded."""
    codec, pads = layer.key_codec, layer.pads
    store, _ = layer.stores
    packed, scale = (
        torch.stack([held[row, ..., start - pad : stop - pad, :] for row, pad in enumerate(pads)])
        for held in (store.codes, store.side)
    )
    if not codec.layout.side_count:
        scale = scale.new_ones(*scale.shape[:2], 1)
    turns = _turns(layer, start, stop)
    units = codec.quantizers[0].state()["units"]
    order = codec.order_[0]
    keys = CommutingKeys(packed, units, scale.transpose(1, 2).float(), turns, order)
    return keys, layer.coded_values(start, stop)


def _turns(layer: VQLayer, start: int, stop: int) -> torch.Tensor:
    """`CommutingKeys.turns` of the slots' positions; channels beyond the pairs stay as they are."""
    rotary, positions = layer.rows.rotary, layer.rows.positions
    assert rotary is not None and positions is not None  # the layer has seen to it
    head_dim = layer.key_codec.head_dim
    found = rotary.turns(layer.index, positions[:, start:stop], head_dim).to(layer.device)
    turns = torch.ones(*found.shape[:2], head_dim // 2, dtype=torch.complex64, device=layer.device)
    turns[..., : found.shape[2]] = torch.view_as_complex(found)
    return turns
