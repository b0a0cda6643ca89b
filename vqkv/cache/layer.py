"""One layer's cache: exact sinks, coded pages, exact tail.

Every row counts its own tokens, from its first unpadded one. Its first `coded` tokens are in
pages, the rest exact in the tail; its first `sinks` tokens are kept exact beside their codes. So a
padded row stores just what the same row without padding does. Keys in the tail and among the
sinks are as the model gave them, after RoPE.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from einops import rearrange
from transformers.cache_utils import CacheLayerMixin

from vqkv.attention import Tables
from vqkv.cache.pages import PageStore, writable
from vqkv.cache.rope import RotaryAdapter
from vqkv.cache.rows import Rows
from vqkv.codec import Codec
from vqkv.compressor import KVCompressor
from vqkv.errors import CacheError
from vqkv.folding import FoldedLayer
from vqkv.layouts import PAGE_TOKENS, Stream, coded_tokens
from vqkv.scheme import STREAMS

#: Tokens decoded at a time, which bounds what decoding holds beside its result.
DECODE_TOKENS = 4096

#: Query rows up to which attention reads the codes itself; above, they are decoded first.
ATTEND_ROWS = 16


class CodedStates:
    """What `update` hands to attention in place of tensors, to be read from the codes."""

    def __init__(self, layer: VQLayer) -> None:
        self.layer = layer


class VQLayer(CacheLayerMixin):
    """Keys and values of one full-attention layer, coded once they leave the exact window.

    Args:
        index: the layer's index in the model.
        compressor: codecs and residency.
        rows: shared by the cache's layers.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, index: int, compressor: KVCompressor, rows: Rows) -> None:
        super().__init__()
        self.index = index
        self.rows = rows
        self.sinks = compressor.scheme.residency.sinks
        self.window = compressor.scheme.residency.window
        self._compressor = compressor
        self._recording = False
        self.coded: list[int] = []
        self._length = 0
        self._tail_start = 0  # the slot of the tail's first entry, exact in some row
        self.is_initialized = False

    # -- transformers' interface -----------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Set up for the batch, type and device of the first states `[B, H, t, D]`."""
        batch, heads, _, head_dim = key_states.shape
        geometry = self._compressor.geometry
        if (heads, head_dim) != (geometry.kv_heads, geometry.head_dim):
            raise CacheError(
                f"layer {self.index}: the compressor is for {geometry.kv_heads} KV heads of dim "
                f"{geometry.head_dim}, the model gives {heads} of dim {head_dim}"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        self._keys = PageStore(batch, self.key_codec.layout, self.device)
        self._values = PageStore(batch, self.value_codec.layout, self.device)
        self._tail_keys = key_states[:, :, :0]
        self._tail_values = value_states[:, :, :0]
        self._sink_keys = key_states.new_zeros(batch, heads, 0, head_dim)
        self._sink_values = value_states.new_zeros(batch, heads, 0, head_dim)
        self.coded = [0] * batch
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Take in new states `[B, H, t, D]` and return what attention reads, all T slots.

        Old tokens that leave the window are coded first. What is new is always read exactly in
        the forward that brings it. Where attention reads the codes itself, it gets `CodedStates`:
        it has to call `share_history` before it calls `read`, and `finish` when it is done.

        Raises:
            CacheError: another batch or geometry, or pre-RoPE codes without an attached model.
            StateError: NaN or infinity in states to be coded.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check(key_states)
        old, new = self._length, self._length + key_states.shape[2]
        if self.index == self._compressor.geometry.compressed[0]:
            self.rows.decoded.clear()
        self._share_history(later=True)
        # While candidates may be rolled back, tokens are coded by the length before them.
        self._code(old if self._recording else new, old)
        self._tail_keys = torch.cat([self._tail_keys, key_states], 2)
        self._tail_values = torch.cat([self._tail_values, value_states], 2)
        self._length = new
        if self.rows.attend and new - old <= ATTEND_ROWS:
            return CodedStates(self), CodedStates(self)
        self.share_history()
        read = self.read(0, new)
        self.finish()
        return read

    def share_history(self) -> None:
        """Decode what only this layer's values are predicted from: `read` finds it there.

        Attention on codes folds that prediction, and does without.
        """
        self._share_history(later=False)

    def finish(self) -> None:
        """What is new has been read, which ends this layer's part of the forward.

        New tokens that the window has left behind already are coded, and reconstructions that no
        later layer needs go.
        """
        if not self._recording:
            self._code(self._length, self._length)
        self.rows.decoded.release(self.index, self._compressor)

    def get_seq_length(self) -> int:
        """T: slots held, padding included."""
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots that attention will see, and the first one's index."""
        return self._length + query_length, 0

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` slots.

        Exact inside the tail. Deeper, the last page is cut and the codes before the cut stay.

        Raises:
            CacheError: a positive count, more than there is, or a cut inside of tokens that share
                a scale.
        """
        coded = self.check_crop(tokens_to_remove)
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        self._length, self.coded = self._length + tokens_to_remove, coded
        first = self._tail_start
        self._tail_start = min(first, self._length)
        kept = max(0, self._length - first)
        # Cloned, so that the memory of what was cut off is freed.
        self._tail_keys = self._tail_keys[:, :, :kept].clone()
        self._tail_values = self._tail_values[:, :, :kept].clone()

    def check_crop(self, tokens_to_remove: int) -> list[int]:
        """Each row's coded tokens after a crop. Raises CacheError where `crop` would."""
        if tokens_to_remove > 0 or -tokens_to_remove > self._length:
            raise CacheError(
                f"crop takes a count from -{self._length} to 0, given {tokens_to_remove}"
            )
        length = self._length + tokens_to_remove
        left = [
            min(coded, max(0, length - pad))
            for coded, pad in zip(self.coded, self._pads(), strict=True)
        ]
        if left == self.coded:
            return left
        run = max(self.key_codec.layout.token_group, self.value_codec.layout.token_group)
        for now, then in zip(self.coded, left, strict=True):
            if then < now and then % run:
                raise CacheError(
                    f"scheme {self._compressor.scheme.name!r} codes runs of {run} tokens "
                    f"together: its {now} coded tokens can be cut to a multiple of {run}, "
                    f"given a cut to {then}"
                )
        return left

    def reset(self) -> None:
        """Forget all tokens, and free their memory."""
        self._forget_reading()
        self.coded, self._length, self._tail_start = [], 0, 0
        self._recording = False
        if self.is_initialized:
            del self._keys, self._values
            for name in self._TENSORS:
                delattr(self, name)
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times in a row."""
        if self.is_initialized:
            self._select(torch.arange(len(self.coded)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows."""
        if self.is_initialized:
            rows = torch.arange(len(self.coded), device=indices.device)[indices]
            self._select(rows)

    def activate_past_recording(self) -> None:
        """From now on tokens may be rolled back, so the latest forward's are not coded yet."""
        self._recording = True

    def offload(self) -> None:
        """Move codes, sinks and tail to the CPU."""
        self._move("cpu")

    def prefetch(self) -> None:
        """Move them back to the layer's device."""
        if self.is_initialized:
            self._move(self.device)

    # -- reading ---------------------------------------------------------------------------

    def read(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of slots `start` to `stop`, `[B, H, n, D]`, keys after RoPE.

        Coded tokens are decoded; padding is zero.
        """
        batch, heads, _, head_dim = self._tail_keys.shape
        shape = (batch, heads, stop - start, head_dim)
        keys = torch.zeros(shape, dtype=self.dtype, device=self.device)
        values = torch.zeros(shape, dtype=self.dtype, device=self.device)
        exact = max(start, self._tail_start)
        if exact < stop:
            held = slice(exact - self._tail_start, stop - self._tail_start)
            keys[:, :, exact - start :] = self._tail_keys[:, :, held]
            values[:, :, exact - start :] = self._tail_values[:, :, held]
        for rows, pad, coded in self._groups():
            low, high = max(start - pad, 0), min(stop - pad, coded)
            for first in range(low, high, DECODE_TOKENS):
                last = min(first + DECODE_TOKENS, high)
                slots = slice(pad + first - start, pad + last - start)
                keys[rows, :, slots] = self._read_keys(rows, pad, first, last).to(self.dtype)
                values[rows, :, slots] = self._read_values(rows, first, last).to(self.dtype)
            sinks = min(high, self._sink_keys.shape[2])
            if low < sinks:
                slots = slice(pad + low - start, pad + sinks - start)
                keys[rows, :, slots] = self._sink_keys[rows, :, low:sinks]
                values[rows, :, slots] = self._sink_values[rows, :, low:sinks]
        return keys, values

    def coded_values(self, start: int, stop: int) -> torch.Tensor:
        """Values `[B, H, n, D]` of slots that are coded in every row, decoded."""
        shape = (*self._tail_values.shape[:2], stop - start, self._tail_values.shape[3])
        values = torch.empty(shape, dtype=self.dtype, device=self.device)
        for rows, pad, _ in self._groups():
            values[rows] = self._read_values(rows, start - pad, stop - pad).to(self.dtype)
        return values

    def exact_states(
        self,
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """Keys after RoPE and values `[B, H, n, D]`, of all rows: of the sinks, and of the tail."""
        return (self._sink_keys, self._sink_values), (self._tail_keys, self._tail_values)

    def take_tail(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        """The tail lies here now, `[B, H, n, D]`, and there are `length` slots."""
        self._tail_keys, self._tail_values, self._length = keys, values, length

    @property
    def recording(self) -> bool:
        """Tokens may be rolled back, see `activate_past_recording`."""
        return self._recording

    def coded_at(self, length: int) -> list[int]:
        """Each row's coded tokens once the cache is so long."""
        rows = zip(self._pads(), self.coded, strict=True)
        return [max(coded, coded_tokens(length - pad, self.window)) for pad, coded in rows]

    def exact_slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where `exact_states` stand, one after the other, `[B, n]`, and which count, bool.

        Rows differ in how many exact tokens they have.
        """
        pads = torch.tensor(self._pads(), device=self.device)[:, None]
        coded = torch.tensor(self.coded, device=self.device)[:, None]
        sinks = torch.arange(self._sink_keys.shape[2], device=self.device)
        tail = torch.arange(self._tail_start, self._length, device=self.device)
        return (
            torch.cat([pads + sinks, tail.expand(len(pads), -1)], 1),
            torch.cat([sinks < coded.clamp(max=self.sinks), tail >= pads + coded], 1),
        )

    @property
    def stores(self) -> tuple[PageStore, PageStore]:
        """Coded keys and values."""
        return self._keys, self._values

    def make_room(self, tokens: int) -> None:
        """Have room for so many coded tokens a row."""
        self._forget_reading()
        for store in self.stores:
            store.make_room(tokens)

    @property
    def tail_start(self) -> int:
        """The slot of the tail's first entry, exact in some row."""
        return self._tail_start

    @property
    def pads(self) -> list[int]:
        """Padded slots at the left of each row."""
        return self._pads()

    def folded(self) -> FoldedLayer | str:
        """What attention on this layer's codes takes, or the reason why that cannot be."""
        return self._compressor.folded(self.index, self.device)

    def read_by(self, compressor: KVCompressor, rows: Rows) -> VQLayer:
        """The same tokens in the same memory, for a compressor that reads these codes its own way.

        What either takes in later stays its own, but for pages that both would write.
        """
        view = copy.copy(self)
        view._compressor, view.rows, view.coded = compressor, rows, list(self.coded)
        if self.is_initialized:
            view._keys, view._values = copy.copy(self._keys), copy.copy(self._values)
        return view

    def check_padding(self, pads: list[int]) -> None:
        """Make sure that what is stored stays in place where row i has `pads[i]` padded slots.

        Rows of which nothing is stored but the tail may change: a chunk of a prefill can be all
        padding, with more to come.

        Raises:
            CacheError: another number of rows, or other padding than tokens were coded with.
        """
        if not self.is_initialized:
            return
        self._check_rows(len(pads))
        for row, (pad, old) in enumerate(zip(pads, self._pads(), strict=True)):
            if pad != old and (self.coded[row] or pad < self._tail_start):
                raise CacheError(
                    f"layer {self.index}: row {row} was coded with {old} slots of padding at its "
                    f"left, the attention mask now says {pad}: pass masks [batch, tokens so far] "
                    "that agree with the first one, or start a new cache"
                )

    @property
    def exact_from(self) -> int:
        """The slot from which on every row is exact; the tail of some rows starts earlier."""
        return max((pad + coded for _, pad, coded in self._groups()), default=0)

    @property
    def key_codec(self) -> Codec:
        """The keys' codec, with codebooks on this layer's device."""
        return self._codec("keys")

    @property
    def value_codec(self) -> Codec:
        """The values' codec, with codebooks on this layer's device."""
        return self._codec("values")

    def nbytes(self) -> dict[str, int]:
        """Bytes of the layer's tensors: codes with their side, exact sinks, exact tail."""
        if not self.is_initialized:
            return {"codes": 0, "sinks": 0, "tail": 0}
        return {
            "codes": self._keys.nbytes + self._values.nbytes,
            "sinks": self._sink_keys.nbytes + self._sink_values.nbytes,
            "tail": self._tail_keys.nbytes + self._tail_values.nbytes,
        }

    # -- saving ----------------------------------------------------------------------------

    _TENSORS = ("_tail_keys", "_tail_values", "_sink_keys", "_sink_values")

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a saved cache holds of this layer."""
        room = -(-max(self.coded) // PAGE_TOKENS) * PAGE_TOKENS  # what lies idle behind is left out
        coded = {}
        for name, store in {"key": self._keys, "value": self._values}.items():
            coded[f"{name}_codes"] = store.codes[:, :, :room]
            coded[f"{name}_side"] = store.side[:, :room]
        return coded | {name.lstrip("_"): getattr(self, name) for name in self._TENSORS}

    def load_tensors(self, tensors: dict[str, torch.Tensor], coded: list[int], length: int) -> None:
        """Take over what `tensors` returned, with each row's coded count and the length."""
        self._forget_reading()
        for name in self._TENSORS:
            setattr(self, name, tensors[name.lstrip("_")])
        self.dtype, self.device = self._tail_keys.dtype, self._tail_keys.device
        batch = len(coded)
        self._keys = PageStore(batch, self.key_codec.layout, self.device)
        self._values = PageStore(batch, self.value_codec.layout, self.device)
        for name, store in (("key", self._keys), ("value", self._values)):
            store.codes = tensors[f"{name}_codes"]
            store.side = tensors[f"{name}_side"]
        self.coded, self._length = coded, length
        self._tail_start = length - self._tail_keys.shape[2]
        self.is_initialized = True

    # -- inside ----------------------------------------------------------------------------

    def _check_rows(self, given: int) -> None:
        if given != len(self.coded):
            raise CacheError(
                f"layer {self.index}: the cache holds {len(self.coded)} rows, given {given}: "
                "reset it, or start a new one"
            )

    @functools.cached_property
    def _pre_rope(self) -> bool:
        return self.key_codec.layout.rope == "pre"

    def _check(self, states: torch.Tensor) -> None:
        self._check_rows(states.shape[0])
        if self._pre_rope:
            held = 0 if self.rows.positions is None else self.rows.positions.shape[1]
            if self.rows.rotary is None or held < self._length + states.shape[2]:
                raise CacheError(
                    f"scheme {self._compressor.scheme.name!r} codes keys before RoPE, which a "
                    "cache alone cannot see: run the model inside `with vqkv.attach(model, "
                    "compressor):`, with the compressor that the cache was made with"
                )

    def _pads(self) -> list[int]:
        return self.rows.pads_of(len(self.coded))

    def _ends(self) -> list[int]:
        """Where coded slots end, by row."""
        return [pad + coded for pad, coded in zip(self._pads(), self.coded, strict=True)]

    def _alike(self) -> dict[tuple[int, int], list[int]]:
        """Rows by padding and coded tokens."""
        alike: dict[tuple[int, int], list[int]] = {}
        for row, key in enumerate(zip(self._pads(), self.coded, strict=True)):
            alike.setdefault(key, []).append(row)
        return alike

    def _groups(self) -> list[tuple[torch.Tensor, int, int]]:
        """Rows that are alike: (indices, padding, coded tokens)."""
        return [
            (torch.tensor(rows, device=self.device), pad, coded)
            for (pad, coded), rows in self._alike().items()
        ]

    def _code(self, length: int, available: int) -> None:
        """Code whole pages of tokens that the window of a cache `length` long has left behind.

        Only the first `available` slots are there to be coded.
        """
        if min(self._ends(), default=0) <= self._tail_start and self.coded_at(length) == self.coded:
            return  # no window has left a page behind, and the tail is as short as it can be
        for (pad, coded), rows in self._alike().items():
            target = min(coded_tokens(length - pad, self.window), coded_tokens(available - pad, 0))
            if target > coded:
                self._code_rows(torch.tensor(rows, device=self.device), pad, coded, target)
        # Padding that is yet to come cannot be cut off.
        start = min([available, *self._ends()])
        if start > self._tail_start:
            # Cloned, so that the memory of what was cut off is freed.
            self._tail_keys = self._tail_keys[:, :, start - self._tail_start :].clone()
            self._tail_values = self._tail_values[:, :, start - self._tail_start :].clone()
            self._tail_start = start

    def _code_rows(self, rows: torch.Tensor, pad: int, start: int, stop: int) -> None:
        self._forget_reading()
        held = slice(pad + start - self._tail_start, pad + stop - self._tail_start)
        keys, values = self._tail_keys[rows, :, held], self._tail_values[rows, :, held]
        self._keep_sinks(rows, start, keys, values)
        if self._pre_rope:
            keys = self._rotary().unrotate(
                self.index, keys, self._tables(rows, pad + start, pad + stop)
            )
        self._encode("keys", rows, start, keys)
        self._encode("values", rows, start, values)
        for row in rows.tolist():
            self.coded[row] = stop

    def _keep_sinks(
        self, rows: torch.Tensor, start: int, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Of the tokens from `start` on that are being coded, keep the sinks exactly."""
        stop = min(self.sinks, start + keys.shape[2])
        if start >= stop:
            return
        if self._sink_keys.shape[2] < stop:
            room = (0, 0, 0, stop - self._sink_keys.shape[2])
            self._sink_keys = torch.nn.functional.pad(self._sink_keys, room)
            self._sink_values = torch.nn.functional.pad(self._sink_values, room)
        self._sink_keys, self._sink_values = writable(self._sink_keys), writable(self._sink_values)
        self._sink_keys[rows, :, start:stop] = keys[:, :, : stop - start]
        self._sink_values[rows, :, start:stop] = values[:, :, : stop - start]

    def _encode(self, stream: Stream, rows: torch.Tensor, start: int, states: torch.Tensor) -> None:
        """Code states `[rows, H, n, D]`, pre-RoPE where the scheme says so, from `start` on."""
        stop = start + states.shape[2]
        sources = self._sources(stream, rows, start, stop)
        tokens = rearrange(states, "b h t d -> (b t) h d")
        encoded = self._codec(stream).encode(tokens, sources)
        self._store(stream).write(rows, start, encoded)
        if self._compressor.last_use(self.index, stream) is not None:
            self._share(stream, rows, start, stop)

    def _share_history(self, *, later: bool) -> None:
        """Put what streams of later layers, or of this one alone, are predicted from in reach."""
        for stream in STREAMS:
            last = self._compressor.last_use(self.index, stream)
            if last is not None and (last > self.index) == later:
                for rows, _, coded in self._groups():
                    for start in range(0, coded, DECODE_TOKENS):
                        self._share(stream, rows, start, min(start + DECODE_TOKENS, coded))

    def _share(self, stream: Stream, rows: torch.Tensor, start: int, stop: int) -> None:
        tokens = self._decode(stream, rows, start, stop)
        self.rows.decoded.put((self.index, stream), len(self.coded), rows, start, tokens)

    def _sources(
        self, stream: Stream, rows: torch.Tensor, start: int, stop: int
    ) -> list[torch.Tensor]:
        keys = self._compressor.sources(self.index, stream)
        found = [self.rows.decoded.get(key, rows, start, stop) for key in keys]
        return [tokens.to(self.device) for tokens in found]

    def _decode(self, stream: Stream, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Tokens `[rows · n, H, D]` in fp32, as they are coded."""
        group = self._codec(stream).layout.token_group
        first, last = start // group * group, -(-stop // group) * group
        sources = self._sources(stream, rows, first, last)
        stored = self._store(stream).read(rows, first, last)
        tokens = self._codec(stream).decode(stored, sources)
        if (first, last) == (start, stop):
            return tokens
        whole = rearrange(tokens, "(r n) h d -> r n h d", r=len(rows))
        return whole[:, start - first : stop - first].flatten(0, 1)

    def _decoded(self, stream: Stream, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The same, from what is shared where it has been decoded already."""
        if self.rows.decoded.holds((self.index, stream)):
            return self.rows.decoded.get((self.index, stream), rows, start, stop)
        return self._decode(stream, rows, start, stop)

    def _codec(self, stream: Stream) -> Codec:
        return self._compressor.codec(self.index, stream, self.device)

    def _store(self, stream: Stream) -> PageStore:
        return self._keys if stream == "keys" else self._values

    def _read_keys(self, rows: torch.Tensor, pad: int, start: int, stop: int) -> torch.Tensor:
        """Keys after RoPE, `[rows, H, n, D]` in fp32."""
        tokens = self._decoded("keys", rows, start, stop)
        keys = rearrange(tokens, "(b t) h d -> b h t d", b=len(rows))
        if self._pre_rope:
            tables = self._tables(rows, pad + start, pad + stop)
            return self._rotary().rotate(self.index, keys, tables)
        return keys

    def _read_values(self, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        tokens = self._decoded("values", rows, start, stop)
        return rearrange(tokens, "(b t) h d -> b h t d", b=len(rows))

    def _rotary(self) -> RotaryAdapter:
        assert self.rows.rotary is not None  # `_check` has seen to it
        return self.rows.rotary

    def _tables(self, rows: torch.Tensor, start: int, stop: int) -> Tables:
        """Cosines and sines of slots `start` to `stop`."""
        assert self.rows.positions is not None  # `_check` has seen to it
        positions = self.rows.positions[rows.to(self.rows.positions.device), start:stop]
        return self._rotary().tables(self.index, positions)

    def _select(self, rows: torch.Tensor) -> None:
        if not self.is_initialized:
            return
        self._forget_reading()
        self.coded = [self.coded[row] for row in rows.tolist()]
        rows = rows.to(self._tail_keys.device)
        self._keys.select(rows)
        self._values.select(rows)
        for name in self._TENSORS:
            setattr(self, name, getattr(self, name)[rows])

    def _forget_reading(self) -> None:
        """Codes are about to move, and must not lie in memory twice."""
        self.rows.readings.pop(self.index, None)

    def _move(self, device: torch.device | str) -> None:
        if self.is_initialized:
            self.rows.steps.clear()  # they hold what moves
            self._forget_reading()
            self._keys.to(device)
            self._values.to(device)
            for name in self._TENSORS:
                setattr(self, name, getattr(self, name).to(device, non_blocking=True))
