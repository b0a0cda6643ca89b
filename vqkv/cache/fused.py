"""Attention on a layer's codes by a fused kernel, where there is one that takes them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch

from vqkv.cache.layer import VQLayer
from vqkv.cache.masks import visible_slots
from vqkv.compressor import KVCompressor
from vqkv.errors import KernelError
from vqkv.folding import FoldedLayer
from vqkv.kernels.attend.codes import (
    AttendLayout,
    Coded,
    Partial,
    Plane,
    Reader,
    Turns,
    selection,
)
from vqkv.kernels.attend.rest import Rest, attend_rest_unchecked
from vqkv.kernels.select import asked_for, circumstances
from vqkv.layouts import PAGE_TOKENS
from vqkv.rotation import channel_units
from vqkv.scheme import STREAMS

log = logging.getLogger(__name__)


#: `Turns.page` and `Turns.offset`.
TurnTables = tuple[torch.Tensor, torch.Tensor]


@dataclass(eq=False)
class _Span:
    """Which tokens of the layers of a device are coded; another one after every page.

    Attributes:
        coded: those of each row.
        start: `[B]` (int32): the first coded token that no sink stands for.
        stop: `[B]` (int32): coded tokens.
        tables: by kind of RoPE; None where positions are irregular.
    """

    coded: list[int]
    start: torch.Tensor
    stop: torch.Tensor
    tables: dict[str, TurnTables | None] = field(default_factory=dict)

    def tables_of(self, layer: VQLayer) -> TurnTables | None:
        """Of a layer whose keys are coded before RoPE."""
        assert layer.rows.rotary is not None  # the layer has seen to it
        kind = layer.rows.rotary.kind(layer.index)
        if kind not in self.tables:
            pages = -(-max(layer.coded) // PAGE_TOKENS)  # a crop may have cut the last one
            self.tables[kind] = turn_tables(layer, pages)
        return self.tables[kind]


class _View(NamedTuple):
    """What the layers of one forward have in common, for one mask.

    Attributes:
        state: what it was made from; another one makes another view.
        span: which tokens are coded.
        hides: a mask hides coded tokens, so they have to be decoded.
        hidden: the exact tokens that a query does not see, `[B, Q or 1, t, n]`; None where each
            query sees all of them.
    """

    state: tuple[object, ...]
    span: _Span
    hides: bool
    hidden: torch.Tensor | None


class _LayerReading:
    """How a layer's codes are read where they lie, as long as `select` chooses the same kernels.

    Attributes:
        chosen: of `circumstances`.
        folded: None where codes do not fold, or no fused kernel takes them.
    """

    def __init__(self, layer: VQLayer, chosen: object) -> None:
        self.chosen = chosen
        self.folded: FoldedLayer | None = None
        self._layout = AttendLayout(layer.key_codec.layout, layer.value_codec.layout)
        if _unread(self._layout, layer.device) is None:
            folded = layer.folded()
            self.folded = None if isinstance(folded, str) else folded
        self._span: _Span | None = None
        self._reader: Reader | None = None

    def reader(self, layer: VQLayer, span: _Span) -> Reader | None:
        """Of the codes of a span; None where positions are irregular."""
        if self._span is span:
            return self._reader
        assert self.folded is not None  # else nobody asks
        tables = None if self.folded.pairs is None else span.tables_of(layer)
        if tables is None and self.folded.pairs is not None:
            return None
        coded = coded_states(layer, self.folded, span.start, span.stop, tables)
        self._span, self._reader = span, Reader(coded, self._layout)
        return self._reader


def fused_attention(
    layer: VQLayer,
    query: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None,
    null_scores: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Attention `[B, Q, t, D]` of queries `[B, Q, t, D]` over all of a layer's tokens.

    Null scores are those of `Rest`.

    None where codes have to be decoded first: no kernel but the naive one takes them, a mask hides
    coded tokens, or positions are not consecutive.
    """
    chosen, readings = circumstances(), layer.rows.readings
    reading: _LayerReading | None = readings.get(layer.index)
    if reading is None or reading.chosen != chosen:
        readings[layer.index] = reading = _LayerReading(layer, chosen)
    folded = reading.folded
    if folded is None or not any(layer.coded):
        return None
    view = _view(layer, query.shape[2], mask)
    reader = None if view.hides else reading.reader(layer, view.span)
    if reader is None:
        return None
    exact = layer.exact_states()
    rest = Rest(folded.output_map, folded.output_bias, *exact, view.hidden, null_scores)
    return attend_folded(query, scaling, folded, reader, rest)


def coded_states(
    layer: VQLayer,
    folded: FoldedLayer,
    start: torch.Tensor,
    stop: torch.Tensor,
    tables: TurnTables | None,
) -> Coded:
    """A layer's codes as kernels read them."""
    keys, values = layer.stores
    return Coded(
        Plane(keys.codes, folded.keys.codewords),
        Plane(values.codes, folded.values.codewords),
        start=start,
        stop=stop,
        turns=None if tables is None or folded.pairs is None else Turns(*tables, folded.pairs),
        key_sums=folded.predicts,
        order=folded.keys.order,
    )


def attend_folded(
    query: torch.Tensor,
    scaling: float,
    folded: FoldedLayer,
    read: Callable[[torch.Tensor], Partial],
    rest: Rest,
) -> torch.Tensor:
    """Attention `[B, Q, t, D]` over coded tokens, by `read`, and exact ones."""
    scaled = query.float() * scaling
    part = read(folded.query(scaled))
    # A `Reader` has looked at what it was given and found; the rest is of the cache's own making.
    output = attend_rest_unchecked(scaled, folded.shifted(part, scaled), rest)
    return output.to(query.dtype)


def _view(layer: VQLayer, queries: int, mask: torch.Tensor | None) -> _View:
    """Made by the first layer of a forward, found again by the others."""
    slots = layer.get_seq_length()
    # The mask itself is part of it: compared by identity, and kept so that no other takes its id.
    state = (mask, queries, slots, layer.tail_start, tuple(layer.pads))
    held: _View | None = layer.rows.shared.get(layer.device)
    if held is not None and held.span.coded != layer.coded:
        held = None
    if held is not None and held.state[0] is mask and held.state[1:] == state[1:]:
        return held
    visible = visible_slots(mask, queries, slots, layer.device)
    # Without a mask attention is causal, and what is coded is older than any query.
    hides = mask is not None and not _all_visible(layer, visible)
    hidden = None
    if not (hides or (mask is None and queries == 1 and _alike(layer))):
        hidden = ~_exact_visible(*layer.exact_slots(), visible)
    view = _View(state, _span(layer) if held is None else held.span, hides, hidden)
    layer.rows.shared[layer.device] = view
    return view


def _span(layer: VQLayer) -> _Span:
    coded = torch.tensor(layer.coded, dtype=torch.int32, device="cpu")
    return _Span(
        list(layer.coded),
        coded.clamp(max=layer.sinks).to(layer.device),
        coded.to(layer.device),
    )


def not_fused(compressor: KVCompressor, device: torch.device) -> str | None:
    """Why some layer's codes have to be decoded to be read, or None.

    Kernels that attend block by block count as decoding, the one that scores keys from tables too:
    it leaves out the keys of long texts alone, so it has to be asked for by `read="attend"`.
    """
    for layer in compressor.geometry.compressed:
        keys, values = (compressor.codec(layer, stream, device).layout for stream in STREAMS)
        reason = _unread(AttendLayout(keys, values), device)
        folded = compressor.folded(layer, device) if reason is None else ""
        if reason is not None or isinstance(folded, str):
            return f"layer {layer}: {reason or folded}"
    return None


def _unread(layout: AttendLayout, device: torch.device) -> str | None:
    """Why no kernel that is worth it, or that was asked for, takes a layer's codes; or None."""
    try:
        kernel = selection(layout, device).kernel
    except KernelError as error:
        if asked_for("attend_codes") is not None:
            raise
        return str(error)
    if kernel.speed == 0 and asked_for("attend_codes") is None:
        return "only the naive kernel takes these codes"
    return None


def _alike(layer: VQLayer) -> bool:
    """Whether all rows have the same exact tokens, and as many sinks as a row can have."""
    rows = set(zip(layer.pads, layer.coded, strict=True))
    return len(rows) == 1 and min(layer.coded) >= layer.sinks


def _all_visible(layer: VQLayer, visible: torch.Tensor) -> bool:
    """Whether every query sees all coded tokens; a mask of a tree of candidates may hide some."""
    rows = [
        visible[row if len(visible) > 1 else 0, ..., pad : pad + coded]
        for row, (pad, coded) in enumerate(zip(layer.pads, layer.coded, strict=True))
    ]
    return all(bool(row.all()) for row in rows)


def _exact_visible(
    slots: torch.Tensor, counts: torch.Tensor, visible: torch.Tensor
) -> torch.Tensor:
    """Which query sees which exact token, `[B, Q or 1, t, n]`."""
    visible = visible.expand(len(slots), -1, -1, -1)
    # Rows with fewer sinks name slots beyond their own; those do not count.
    index = slots.clamp(max=visible.shape[3] - 1)[:, None, None]
    return visible.gather(3, index.expand(*visible.shape[:3], -1)) & counts[:, None, None]


def turn_tables(layer: VQLayer, pages: int) -> TurnTables | None:
    """`Turns.page` of so many pages, and `Turns.offset`; None where positions are irregular.

    Those of coded tokens are looked at; later ones will stand right after them.
    """
    rotary, positions = layer.rows.rotary, layer.rows.positions
    assert rotary is not None and positions is not None
    head_dim = layer.key_codec.head_dim
    # By rows on the CPU, whatever torch's default device is.
    firsts = torch.zeros(len(layer.coded), pages, dtype=torch.int64, device="cpu")
    tokens = torch.arange(max(*layer.coded, pages), device="cpu")
    for row, (pad, coded) in enumerate(zip(layer.pads, layer.coded, strict=True)):
        mine = positions[row, pad : pad + coded].cpu().long()
        if not coded:
            continue
        if mine.ndim > 1:
            axes, mine = mine, mine[:, 0]
            if not (axes == mine[:, None]).all():
                log.info("layer %d is decoded to be read: row %d has images", layer.index, row)
                return None
        if not torch.equal(mine, mine[0] + tokens[:coded]):
            log.info("layer %d is decoded to be read: row %d skips positions", layer.index, row)
            return None
        firsts[row] = mine[0] + PAGE_TOKENS * tokens[:pages]
    page = _with_rest(rotary.turns(layer.index, firsts.to(positions.device), head_dim), head_dim)
    # Where a model scales its tables (YaRN), the scale belongs to each key once.
    page = page / page.norm(dim=-1, keepdim=True)
    return page.to(layer.device), _offset_turns(layer)


def _offset_turns(layer: VQLayer) -> torch.Tensor:
    """`Turns.offset`, always the same tensor, so that what kernels make of it is made once."""
    rotary, positions, shared = layer.rows.rotary, layer.rows.positions, layer.rows.shared
    assert rotary is not None and positions is not None
    head_dim = layer.key_codec.head_dim
    key = ("offset", rotary.kind(layer.index), head_dim, layer.device)
    if key not in shared:
        offsets = torch.arange(PAGE_TOKENS, device=positions.device)[None]
        turns = _with_rest(rotary.turns(layer.index, offsets, head_dim), head_dim)
        shared[key] = turns[0].to(layer.device)
    return cast(torch.Tensor, shared[key])


def _with_rest(turns: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Channels beyond the pairs, two by two, stay as they are: `[B, T, D / 2, 2]`."""
    rest = len(channel_units(head_dim, ())) - turns.shape[2]
    still = torch.tensor([1.0, 0.0], device=turns.device).expand(*turns.shape[:2], rest, 2)
    return torch.cat([turns, still], 2)
