"""A cache that quantizes before use: every state but the sinks is read as its reconstruction.

For comparing quality. A teacher-forced forward through an ordinary cache never reads what it has
stored, and so measures nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from einops import rearrange
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

from vqkv.artefact import check_fits
from vqkv.cache.rows import Rows
from vqkv.compressor import KVCompressor
from vqkv.errors import CacheError
from vqkv.layouts import Stream


class BeforeUseCache(Cache):
    """Serves one forward over one window, then is thrown away. Stores nothing.

    Args:
        compressor: fitted, or data-free; its residency's sinks stay exact, its window is ignored.
        config: the model's transformers config.
    """

    def __init__(self, compressor: KVCompressor, config: Any) -> None:
        check_fits(compressor.geometry, compressor.provenance.base_model, config, repr(compressor))
        self.compressor = compressor
        self.rows = Rows()
        layers = list(DynamicCache(config=config).layers)
        for index in compressor.geometry.compressed:
            layers[index] = BeforeUseLayer(index, compressor, self.rows)
        super().__init__(layers=layers)


class ReconstructingLayer(CacheLayerMixin, ABC):
    """One layer of a cache that serves one forward, whatever codes it.

    Args:
        sinks: tokens at the start that stay exact.
    """

    is_sliding = False

    def __init__(self, sinks: int) -> None:
        super().__init__()
        self.sinks = sinks
        self._length = 0

    @abstractmethod
    def reconstructed(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States `[B, H, T, D]` as they come back from their codes, in tensors of their own."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is stored."""
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The states `[B, H, T, D]` as they come back from their codes, sinks exact.

        Raises:
            CacheError: a second forward.
        """
        if self._length:
            raise CacheError("before-use scores one forward per cache: start a new one")
        self._length = key_states.shape[2]
        keys, values = self.reconstructed(key_states, value_states)
        keys, values = keys.to(key_states.dtype), values.to(value_states.dtype)
        keys[:, :, : self.sinks] = key_states[:, :, : self.sinks]
        values[:, :, : self.sinks] = value_states[:, :, : self.sinks]
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots that attention will see, and the first one's index."""
        return self._length + query_length, 0

    def get_seq_length(self) -> int:
        """Slots seen."""
        return self._length

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1


class BeforeUseLayer(ReconstructingLayer):
    """One layer of `BeforeUseCache`."""

    def __init__(self, index: int, compressor: KVCompressor, rows: Rows) -> None:
        super().__init__(compressor.scheme.residency.sinks)
        self.index = index
        self.compressor = compressor
        self.rows = rows

    def reconstructed(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Through the compressor's codecs.

        Raises:
            CacheError: padding, or pre-RoPE codes without an attached model.
        """
        if any(self.rows.pads):
            raise CacheError("before-use takes windows without padding")
        decoded = self._keys(keys), self.coded("values", values)
        self.rows.decoded.release(self.index, self.compressor)
        return decoded

    def _keys(self, keys: torch.Tensor) -> torch.Tensor:
        if self.compressor.codec(self.index, "keys", keys.device).layout.rope != "pre":
            return self.coded("keys", keys)
        rotary, positions = self.rows.rotary, self.rows.positions
        if rotary is None or positions is None:
            raise CacheError(
                f"scheme {self.compressor.scheme.name!r} codes keys before RoPE: run the model "
                "inside `with vqkv.attach(model, compressor):`"
            )
        tables = rotary.tables(self.index, positions)
        decoded = self.coded("keys", rotary.unrotate(self.index, keys, tables))
        return rotary.rotate(self.index, decoded, tables)

    def coded(self, stream: Stream, states: torch.Tensor) -> torch.Tensor:
        """States `[B, H, T, D]` of a stream, as it codes them, there and back."""
        batch, _, tokens, _ = states.shape
        rows = torch.arange(batch)
        codec = self.compressor.codec(self.index, stream, states.device)
        sources = [
            self.rows.decoded.get(key, rows, 0, tokens).to(states.device)
            for key in self.compressor.sources(self.index, stream)
        ]
        given = rearrange(states, "b h t d -> (b t) h d")
        decoded = codec.there_and_back(given, sources, batch)
        if self.compressor.last_use(self.index, stream) is not None:
            self.rows.decoded.put((self.index, stream), batch, rows, 0, decoded)
        return rearrange(decoded, "(b t) h d -> b h t d", b=batch)
