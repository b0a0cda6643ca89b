"""A before-use cache through a peer, in the place that `vqkv.cache.BeforeUseCache` has for us."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from benchmarks.peers.base import Peer
from vqkv.cache.before_use import ReconstructingLayer
from vqkv.cache.rope import ForwardCapture, RotaryAdapter
from vqkv.evaluation.arms import OpenCache
from vqkv.geometry import Geometry
from vqkv.layouts import Stream


class PeerLayer(ReconstructingLayer):
    """One layer of a cache that serves one forward over one window.

    Args:
        index: of the layer.
        peer: fitted, if it learns.
        sinks: tokens at the start that stay exact.
        capture: of the running forward, and `adapter` its model's; both for pre-RoPE keys.
        destroy: zero all that the peer stores, for the canary.
    """

    def __init__(
        self,
        index: int,
        peer: Peer,
        sinks: int,
        capture: ForwardCapture,
        adapter: RotaryAdapter | None,
        destroy: bool,
    ) -> None:
        super().__init__(sinks)
        self.index = index
        self.peer = peer
        self.capture = capture
        self.adapter = adapter
        self.destroy = destroy

    def reconstructed(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Through the peer."""
        return self._keys(keys), self._through("values", values)

    def _keys(self, keys: torch.Tensor) -> torch.Tensor:
        if self.adapter is None:
            return self._through("keys", keys)
        tables = self.capture.tables(self.index)
        decoded = self._through("keys", self.adapter.unrotate(self.index, keys, tables))
        return self.adapter.rotate(self.index, decoded, tables)

    def _through(self, stream: Stream, states: torch.Tensor) -> torch.Tensor:
        # A sink's large states would stretch the ranges of its neighbours; the first token that is
        # none takes its place.
        coded = states.clone()
        coded[:, :, : self.sinks] = states[:, :, self.sinks : self.sinks + 1]
        stored = self.peer.encode(self.index, stream, coded)
        if self.destroy:
            for tensor in self.peer.tensors(stored):
                tensor.zero_()
        return self.peer.decode(self.index, stream, stored).clone()


def opener(model: PreTrainedModel, peer: Peer, sinks: int, *, destroy: bool = False) -> OpenCache:
    """Opens caches of a peer, for `vqkv.evaluation.arms.Arms`.

    Raises:
        ModelError: the peer wants keys before RoPE, and the family cannot give them.
    """
    layers = Geometry.from_model(model).compressed
    adapter = RotaryAdapter(model, layers) if peer.rope == "pre" else None

    @contextmanager
    def open_cache() -> Iterator[Cache]:
        with ForwardCapture(model, adapter) as capture:
            held = list(DynamicCache(config=model.config).layers)
            for index in layers:
                held[index] = PeerLayer(index, peer, sinks, capture, adapter, destroy)
            yield Cache(layers=held)

    return open_cache
