"""A decoding step of fixed shapes and memory, as a CUDA graph replays it.

The exact tail lies in buffers with room to spare, and a step writes its token into them. What
changes from step to step is in tensors: where that token goes, which exact tokens count, how many
are coded. Python is not asked, so none of the cache's layers knows of a step: `StaticCache.advance`
tells them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from vqkv.cache.fused import TurnTables, attend_folded, coded_states, turn_tables
from vqkv.cache.layer import VQLayer
from vqkv.folding import FoldedLayer
from vqkv.kernels.attend.codes import AttendLayout, attend_codes
from vqkv.kernels.attend.rest import Rest
from vqkv.layouts import PAGE_TOKENS

#: Room for pages to come, in tokens: at least so many, or one for so many that are coded. A page
#: that finds none moves all codes, and the step has to be made anew.
ROOM, ROOM_PART = 1024, 8


#: By kind of RoPE.
StepTables = dict[str, TurnTables]


@dataclass(frozen=True)
class StepState:
    """What the layers of a step share.

    Attributes:
        slot: `[1]` (int64): where in the buffers of the tail the new token goes.
        start: `[B]` (int32): see `vqkv.kernels.attend.codes.Coded`.
        stop: `[B]` (int32).
        hidden: `[B, 1, 1, n]`: which of the sinks and of the tail's buffer do not count.
        tables: of all pages there is room for.
    """

    slot: torch.Tensor
    start: torch.Tensor
    stop: torch.Tensor
    hidden: torch.Tensor
    tables: StepTables


class StaticStates:
    """What `update` hands to attention in place of tensors."""

    def __init__(self, layer: StaticLayer) -> None:
        self.layer = layer


class StaticLayer(CacheLayerMixin):
    """One layer of a step: reads the codes and sinks of a cache's layer, and owns its tail."""

    is_sliding = False

    def __init__(
        self, layer: VQLayer, folded: FoldedLayer, state: StepState, kind: str | None, room: int
    ) -> None:
        super().__init__()
        self.is_initialized = True
        self._state, self._folded = state, folded
        self._layout = AttendLayout(layer.key_codec.layout, layer.value_codec.layout)
        self._coded = coded_states(
            layer, folded, state.start, state.stop, None if kind is None else state.tables[kind]
        )
        self._sinks, (keys, values) = layer.exact_states()
        self._tail = tuple(x.new_zeros(*x.shape[:2], room, x.shape[3]) for x in (keys, values))
        self._length = layer.get_seq_length()

    def take(self, layer: VQLayer) -> None:
        """Take the layer's tail over, and let the layer read it here from now on."""
        states = layer.exact_states()[1]
        for buffer, held in zip(self._tail, states, strict=True):
            buffer[:, :, : held.shape[2]] = held
        self.show(layer, layer.get_seq_length(), states[0].shape[2])

    def show(self, layer: VQLayer, length: int, tail: int) -> None:
        """Let the layer know of so many slots, and so many tokens in its tail."""
        keys, values = self._tail
        layer.take_tail(keys[:, :, :tail], values[:, :, :tail], length)

    def reads(self, layer: VQLayer) -> bool:
        """Whether the layer's codes and sinks are the tensors that they were."""
        keys, values = layer.stores
        held = (self._coded.keys.codes, self._coded.values.codes, *self._sinks)
        given = (keys.codes, values.codes, *layer.exact_states()[0])
        return all(a is b for a, b in zip(held, given, strict=True))

    def holds(self, layer: VQLayer) -> bool:
        """Whether the layer's tail lies here."""
        tail = layer.exact_states()[1]
        return all(a.data_ptr() == b.data_ptr() for a, b in zip(self._tail, tail, strict=True))

    def read(
        self, query: torch.Tensor, scaling: float, null_scores: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention `[B, Q, 1, D]` of queries `[B, Q, 1, D]` over all tokens."""
        keys, values = self._tail
        rest = Rest(
            self._folded.output_map,
            self._folded.output_bias,
            self._sinks,
            (keys, values),
            self._state.hidden,
            null_scores,
        )
        # Not by a `Reader` that is kept: where codes begin and end changes.
        read = functools.partial(attend_codes, coded=self._coded, layout=self._layout)
        return attend_folded(query, scaling, self._folded, read, rest)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """It is initialized."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Write the new token's states `[B, H, 1, D]`."""
        for buffer, new in zip(self._tail, (key_states, value_states), strict=True):
            buffer.index_copy_(2, self._state.slot, new.to(buffer.dtype))
        return StaticStates(self), StaticStates(self)

    def get_seq_length(self) -> int:
        """Slots before the new one, when the step was made."""
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots that attention will see, and the first one's index."""
        return self._length + query_length, 0

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1


class StaticCache(Cache):
    """The cache of a step, over the layers of another one, which it does not keep alive.

    Args:
        layers: of one cache.
        folded: of each layer.
        tables: of `step_tables`.
    """

    def __init__(
        self, layers: Sequence[VQLayer], folded: Sequence[FoldedLayer], tables: StepTables
    ) -> None:
        first = layers[0]
        room = first.window + 2 * PAGE_TOKENS
        batch, device = len(first.coded), first.device
        self._sinks = first.exact_states()[0][0].shape[2]
        self._state = StepState(
            slot=torch.zeros(1, dtype=torch.int64, device=device),
            start=torch.zeros(batch, dtype=torch.int32, device=device),
            stop=torch.zeros(batch, dtype=torch.int32, device=device),
            hidden=torch.ones(batch, 1, 1, self._sinks + room, dtype=torch.bool, device=device),
            tables=tables,
        )
        super().__init__(
            layers=[
                StaticLayer(layer, each, self._state, _kind(layer), room)
                for layer, each in zip(layers, folded, strict=True)
            ]
        )
        self.take(layers, tables)

    def take(self, layers: Sequence[VQLayer], tables: StepTables) -> None:
        """Take in what the layers hold now, and the tables of that."""
        first, state = layers[0], self._state
        for static, layer in self._pairs(layers):
            static.take(layer)
        coded = torch.tensor(first.coded, dtype=torch.int32, device="cpu")
        state.start.copy_(coded.clamp(max=first.sinks))
        state.stop.copy_(coded)
        hidden = ~first.exact_slots()[1]
        state.hidden.fill_(True)
        state.hidden[:, 0, 0, : hidden.shape[1]] = hidden
        state.slot.fill_(hidden.shape[1] - self._sinks)
        for kind, (page, _) in tables.items():
            # Within a page turns never change: a `RotaryAdapter` refuses frequencies that do.
            state.tables[kind][0].copy_(page)

    def reads(self, layers: Sequence[VQLayer]) -> bool:
        """Whether the layers' codes and sinks are the tensors that they were."""
        return all(static.reads(layer) for static, layer in self._pairs(layers))

    def holds(self, layers: Sequence[VQLayer]) -> bool:
        """Whether nothing but steps has happened to the layers since they were taken in."""
        return all(static.holds(layer) for static, layer in self._pairs(layers))

    def begin(self) -> None:
        """The new token counts. Part of the step."""
        self._state.hidden.index_fill_(3, self._state.slot + self._sinks, False)

    def advance(self, layers: Sequence[VQLayer]) -> None:
        """A step has been made: tell the layers, and make the next slot ready."""
        length, tail = layers[0].get_seq_length() + 1, layers[0].exact_states()[1][0].shape[2] + 1
        for static, layer in self._pairs(layers):
            static.show(layer, length, tail)
        self._state.slot.add_(1)

    def _pairs(self, layers: Sequence[VQLayer]) -> list[tuple[StaticLayer, VQLayer]]:
        return list(zip(self.layers, layers, strict=True))  # type: ignore[arg-type]


def make_room(layers: Sequence[VQLayer]) -> None:
    """Room for pages to come, so that codes stay where they are for a while."""
    for layer in layers:
        coded = max(layer.coded)
        layer.make_room(coded + max(ROOM, coded // ROOM_PART))


def step_tables(layers: Sequence[VQLayer]) -> StepTables | None:
    """By kind of RoPE, of all pages there is room for; None where positions are irregular."""
    found: StepTables = {}
    for layer in layers:
        kind = _kind(layer)
        if kind is None or kind in found:
            continue
        tables = turn_tables(layer, layer.stores[0].capacity // PAGE_TOKENS)
        if tables is None:
            return None
        found[kind] = tables
    return found


def _kind(layer: VQLayer) -> str | None:
    """Of the layer's RoPE; None where keys are coded after it."""
    if layer.key_codec.layout.rope != "pre":
        return None
    assert layer.rows.rotary is not None  # the layer has seen to it
    return layer.rows.rotary.kind(layer.index)
