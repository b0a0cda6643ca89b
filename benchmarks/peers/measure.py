"""A peer on texts: the same windows, scores, canary and passages as `vqkv compare` has."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.peers.base import Peer
from benchmarks.peers.cache import opener
from vqkv.calibration import Spool, Text, calibration_windows, capture, text_windows
from vqkv.calibration.capture import Kind
from vqkv.compressor import EXACT_BYTES
from vqkv.evaluation import Evaluation
from vqkv.evaluation.arms import Arms
from vqkv.evaluation.compare import Row, Settings, timed
from vqkv.evaluation.exact import ExactLogits
from vqkv.evaluation.quality import measure
from vqkv.geometry import Geometry
from vqkv.layouts import Stream
from vqkv.scheme import STREAMS

#: Called with what is being done, how much of it, and of what.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Bench:
    """What all peers are measured with.

    Attributes:
        model: and its `tokenizer`.
        settings: as of `vqkv compare`.
        exact: logits of the exact arm, shared by all peers.
        tell: told how far it is.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: Settings
    exact: ExactLogits
    tell: Progress

    def fitted(self, peer: Peer, texts: list[Text]) -> float | None:
        """Fit a peer to the model's states on texts, without the sinks of each window.

        Returns:
            Seconds of learning, after the states were captured; None where a peer learns nothing.
        """
        if not peer.learns:
            return None
        settings, layers = self.settings, Geometry.from_model(self.model).compressed
        windows = calibration_windows(
            self.tokenizer, texts, settings.calibration_tokens, settings.context
        )
        kinds: dict[Stream, Kind] = {
            "keys": "pre_keys" if peer.rope == "pre" else "keys",
            "values": "values",
        }
        wants = {layer: list(kinds.values()) for layer in layers}
        with tempfile.TemporaryDirectory() as scratch:
            spool = Spool(Path(scratch), settings.sinks)
            capture(self.model, wants, windows, spool, self._named(peer.name))
            begun = time.perf_counter()
            for done, layer in enumerate(layers, start=1):
                for stream, kind in kinds.items():
                    peer.fit(layer, stream, torch.cat(list(spool.states(layer, kind).chunks())))
                self.tell(f"{peer.name}: learn", done, len(layers))
            return time.perf_counter() - begun

    def evaluated(self, peer: Peer, text: Text, passages: int) -> Evaluation:
        """One text; bytes are those of its first window."""
        begun = time.perf_counter()
        settings, model = self.settings, self.model
        windows = text_windows(
            self.tokenizer, text, settings.tokens, settings.context, settings.skip
        )
        quality = measure(
            Arms(model, opener(model, peer, settings.sinks), exact=self.exact),
            Arms(model, opener(model, peer, settings.sinks, destroy=True), exact=self.exact),
            windows,
            passages=passages,
            passage_lengths=settings.passage_lengths,
            progress=self._named(f"{peer.name}: {text.name}"),
        )
        geometry = Geometry.from_model(model)
        values = 2 * len(geometry.compressed) * geometry.kv_heads * geometry.head_dim
        length = len(windows[0])
        coded, side = stored_bytes(peer, geometry, length), peer.side_bytes()
        total = coded + EXACT_BYTES * values * settings.sinks
        return Evaluation(
            **quality.figures(),
            scheme=peer.name,
            text=text.name,
            mode="before-use",
            dtype=str(model.dtype).removeprefix("torch."),
            context=settings.context,
            chunk=None,
            skip=settings.skip,
            sinks=settings.sinks,
            window=0,
            bits_per_value=8 * coded / (values * length),
            effective_bits_per_value=8 * (total + side) / (values * length),
            cache_bytes=total,
            cache_bytes_exact=EXACT_BYTES * values * length,
            cache_bytes_length=length,
            cache_bytes_window=0,
            side_bytes={"codebooks": side, "total": side},
            notes=tuple(quality.repeated.notes),
            seconds=time.perf_counter() - begun,
        )

    def rows(self, peer: Peer, calibration: list[Text], texts: list[Text]) -> Iterator[Row]:
        """One row for each text; repeated passages are of the first one."""
        seconds = self.fitted(peer, calibration)
        encode_us, decode_us = coding_times(peer, Geometry.from_model(self.model))
        for index, text in enumerate(texts):
            passages = self.settings.passages if index == 0 else 0
            evaluation = self.evaluated(peer, text, passages)
            yield Row(evaluation.to_dict(), seconds, encode_us, decode_us)

    def _named(self, name: str) -> Progress:
        return lambda phase, done, total: self.tell(f"{name}: {phase}", done, total)


@torch.inference_mode()
def stored_bytes(peer: Peer, geometry: Geometry, tokens: int) -> int:
    """Of all tensors that the peer stores of `tokens` tokens, layers being alike."""
    x = torch.randn(1, geometry.kv_heads, tokens, geometry.head_dim)
    layer = geometry.compressed[0]
    stored = [peer.encode(layer, stream, x) for stream in STREAMS]
    sizes = (tensor.nbytes for each in stored for tensor in peer.tensors(each))
    return len(geometry.compressed) * sum(sizes)


def coding_times(peer: Peer, geometry: Geometry) -> tuple[float, float]:
    """As those of a compressor."""

    def once(x: torch.Tensor) -> Iterator[tuple[float, float]]:
        for layer in geometry.compressed:
            for stream in STREAMS:
                start = time.perf_counter()
                stored: Any = peer.encode(layer, stream, x)
                middle = time.perf_counter()
                peer.decode(layer, stream, stored)
                yield middle - start, time.perf_counter() - middle

    return timed(once, geometry)
