"""Reconstructions that a running forward shares, of streams that others are predicted from."""

from __future__ import annotations

import torch
from einops import rearrange

from vqkv.compressor import KVCompressor, StreamKey
from vqkv.errors import CacheError


class Decoded:
    """Tokens `[B, T, H, D]` (fp32) of each stream that a later one is predicted from.

    A layer puts its streams in when it runs, and they go when the last layer has run that is
    predicted from them. Between forwards there is nothing in it.
    """

    def __init__(self) -> None:
        self._held: dict[StreamKey, torch.Tensor] = {}

    def holds(self, key: StreamKey) -> bool:
        """Whether a stream is in it."""
        return key in self._held

    def put(
        self, key: StreamKey, batch: int, rows: torch.Tensor, start: int, tokens: torch.Tensor
    ) -> None:
        """Add tokens `[R·n, H, D]` of R rows of the batch, row by row, from token `start` on."""
        new = rearrange(tokens, "(r n) h d -> r n h d", r=len(rows))
        stop = start + new.shape[1]
        held = self._held.get(key)
        if held is None:
            held = new.new_zeros(batch, stop, *new.shape[2:])
        elif held.shape[1] < stop:
            held = torch.nn.functional.pad(held, (0, 0, 0, 0, 0, stop - held.shape[1]))
        held[rows, start:stop] = new
        self._held[key] = held

    def get(self, key: StreamKey, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Tokens `start` to `stop` of these rows, `[R·n, H, D]`.

        Raises:
            CacheError: the stream has not run in this forward, or none is running.
        """
        if key not in self._held:
            layer, stream = key
            raise CacheError(
                f"{stream} of layer {layer} are not there to predict from: a predicted stream is "
                "read while the model runs, after the layers before it"
            )
        held = self._held[key]
        return held[rows.to(held.device), start:stop].flatten(0, 1)

    def release(self, layer: int, compressor: KVCompressor) -> None:
        """`layer` has run: let go of what no layer after it is predicted from."""
        self._held = {
            key: tokens
            for key, tokens in self._held.items()
            if (compressor.last_use(*key) or 0) > layer
        }

    def clear(self) -> None:
        """A forward begins: forget what one that failed may have left."""
        self._held.clear()
