"""Decoding steps of an attached model that replay a CUDA graph.

Launching a step's kernels one by one can take longer than they run, whatever a cache saves. Inside
of `DecodingSteps` a forward of one token a row is captured once and replayed from then on, until
codes have to move; forwards that code a page, and all others, run as usual.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from weakref import WeakSet, ref

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from vqkv.attention import position_axes, rotary_module, text_config
from vqkv.cache.layer import VQLayer
from vqkv.cache.rows import Rows
from vqkv.cache.static import StaticCache, make_room, step_tables
from vqkv.cache.vqcache import VQCache
from vqkv.compressor import KVCompressor
from vqkv.errors import KernelError

#: Arguments of a forward that a step takes. Others have to be None or False.
TAKEN = {"input_ids", "attention_mask", "position_ids", "past_key_values", "cache_position"}
TAKEN |= {"use_cache", "return_dict", "logits_to_keep"}
#: What a model's config may ask of every forward.
ASKED_BY_CONFIG = ("output_hidden_states", "output_attentions", "output_router_logits")


class Step:
    """A forward of one token a row, of fixed shapes: captured where there is a GPU, else run anew.

    Args:
        forward: the model's.
        static: what it reads.
        batch: rows.
        device: of the model.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        static: StaticCache,
        batch: int,
        device: torch.device,
    ) -> None:
        self.static = static
        self._ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._positions = torch.zeros_like(self._ids)
        self._forward = forward
        self._autocast = _autocast(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: torch.Tensor | None = None

    @property
    def serves(self) -> bool:
        """Whether modes are as they were: of autocast, and of inference, whose tensors can only be
        written to in it."""
        device = self._ids.device
        inference = torch.is_inference_mode_enabled() or not self._ids.is_inference()
        return inference and self._autocast == _autocast(device)

    def run(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits `[B, 1, V]` of tokens `[B, 1]` at positions `[B or 1, 1]`.

        Raises:
            KernelError: the model's forward cannot be captured.
        """
        self._ids.copy_(ids)
        self._positions.copy_(positions)
        if self._ids.device.type != "cuda":
            return self._step()
        with torch.cuda.device(self._ids.device):
            if self._graph is None:
                self._graph = self._captured()
            self._graph.replay()
        assert self._logits is not None  # captured with the graph
        return self._logits.clone()

    def _step(self) -> torch.Tensor:
        self.static.begin()
        output = self._forward(
            input_ids=self._ids,
            position_ids=self._positions,
            past_key_values=self.static,
            use_cache=True,
        )
        logits: torch.Tensor = output.logits
        return logits

    def _captured(self) -> torch.cuda.CUDAGraph:
        current, side, graph = (
            torch.cuda.current_stream(),
            torch.cuda.Stream(),
            torch.cuda.CUDAGraph(),
        )
        # Kernels compile, and tables are made, in a step before, which writes to the same slot.
        side.wait_stream(current)
        with torch.cuda.stream(side):
            self._step()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(graph, capture_error_mode="thread_local")
        try:
            # A capture that fails does not give the stream back by itself.
            with torch.cuda.stream(current), capture:
                self._logits = self._step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise KernelError(
                "this model's forward cannot be captured as a CUDA graph, as where it waits for "
                f"the GPU to say what comes next ({error}): attach it without graphs=True"
            ) from error
        return graph


@dataclass
class _Held:
    """What is kept of a cache.

    Attributes:
        codes: that the step reads; before there is one, that the last candidate for a step saw.
        step: made when a candidate sees the codes that the one before it saw.
        refused: tokens coded when no step could be made: positions skip, or codes do not fold.
    """

    codes: ref[torch.Tensor]
    step: Step | None = None
    refused: list[int] | None = None


class DecodingSteps:
    """Replaces the forward of an attached model, as a context manager.

    Args:
        model: attached, reading codes by a fused kernel.
        compressor: whose caches are served.
    """

    def __init__(self, model: PreTrainedModel, compressor: KVCompressor) -> None:
        self._model, self._compressor = model, compressor
        self._forward = model.forward
        self._replaced: Callable[..., Any] | None = None
        first = compressor.geometry.compressed[0]
        self._axes = position_axes(rotary_module(model), text_config(model), first)
        self._served: WeakSet[Rows] = WeakSet()
        #: Forwards that were steps.
        self.taken = 0

    def __enter__(self) -> Self:
        @functools.wraps(self._forward)  # transformers looks at its parameters
        def forward(*args: Any, **kwargs: Any) -> Any:
            given = {**kwargs, **dict(zip(["input_ids"], args, strict=False))}
            output = None if len(args) > 1 else self._taken(given)
            if output is not None:
                return output
            self._let_go(given)
            return self._forward(*args, **kwargs)

        # Other libraries, and another attachment, replace it too.
        self._replaced = vars(self._model).get("forward")
        self._model.forward = forward
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Gives the model its forward back, and the graphs' memory."""
        if self._replaced is None:
            del self._model.forward
        else:
            self._model.forward = self._replaced
        for rows in self._served:
            rows.steps.pop(id(self), None)

    def _taken(self, given: dict[str, Any]) -> Any:
        """The output of a step, or None where the forward is none."""
        cache, ids = given.get("past_key_values"), given.get("input_ids")
        if torch.is_grad_enabled() or not isinstance(cache, VQCache) or ids is None:
            return None
        layers = list(cache.coded_layers.values())
        if not self._ready(cache, layers):
            return None
        pads, length = layers[0].pads, layers[0].get_seq_length()
        positions = given.get("position_ids")
        if positions is None and not any(pads) and not self._axes:  # else images move them on
            positions = torch.full_like(ids, length)
        if positions is not None and positions.ndim == 3:
            positions = _along_one_axis(positions[-self._axes :])
        if (
            tuple(ids.shape) != (len(pads), 1)
            or positions is None  # models differ in what they make of a mask then
            or tuple(positions.shape) not in ((1, 1), (len(pads), 1))
            or self._asks_for_more(given)
            or not _all_real(given.get("attention_mask"), pads, length + 1)
            or (step := self._step_of(cache, layers)) is None
        ):
            return None
        logits = step.run(ids, positions)
        step.static.advance(layers)
        if cache.rows.positions is not None:
            cache.rows.note(length, positions.expand(len(pads), -1).to(torch.int32), None)
        self.taken += 1
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _asks_for_more(self, given: dict[str, Any]) -> bool:
        """Whether more is wanted than logits and a cache of the new token."""
        others = [value for name, value in given.items() if name not in TAKEN]
        return (
            given.get("use_cache") is False
            or given.get("return_dict") is False
            or any(value is not None and value is not False for value in others)
            or any(getattr(self._model.config, name, False) for name in ASKED_BY_CONFIG)
        )

    def _ready(self, cache: VQCache, layers: list[VQLayer]) -> bool:
        """Whether a step can read the cache, and codes no page."""
        first = layers[0]
        return (
            cache.compressor is self._compressor
            and cache.rows.attend
            and len(layers) == len(cache.layers)
            and all(layer.is_initialized and not layer.recording for layer in layers)
            and all(layer.coded == first.coded for layer in layers)
            and all(layer.exact_states()[1][0].device == first.device for layer in layers)
            and any(first.coded)
            and first.coded_at(first.get_seq_length() + 1) == first.coded
        )

    def _step_of(self, cache: VQCache, layers: list[VQLayer]) -> Step | None:
        """The cache's step; None where there is none yet, or can be none."""
        steps, codes = cache.rows.steps, layers[0].stores[0].codes
        held: _Held | None = steps.get(id(self))
        if held is None or held.codes() is not codes:
            # Codes that move all the time, as in a beam search, are not worth a capture.
            steps[id(self)] = _Held(ref(codes))
            self._served.add(cache.rows)
            return None
        if held.refused == layers[0].coded:
            return None
        if held.step is None or not (held.step.static.reads(layers) and held.step.serves):
            held.step = None  # before another takes its memory
            held.step = self._made(layers)
            held.codes = ref(layers[0].stores[0].codes)
        elif not held.step.static.holds(layers):
            tables = step_tables(layers)
            if tables is None:
                held.step = None
            else:
                held.step.static.take(layers, tables)
        held.refused = None if held.step else list(layers[0].coded)
        return held.step

    def _made(self, layers: list[VQLayer]) -> Step | None:
        """A step; None where positions are irregular, or codes do not fold."""
        first = layers[0]
        folded = [self._compressor.folded(layer.index, layer.device) for layer in layers]
        foldable = [each for each in folded if not isinstance(each, str)]
        if len(foldable) < len(folded) or step_tables(layers) is None:
            return None
        make_room(layers)
        tables = step_tables(layers)
        assert tables is not None  # there were some of fewer pages
        static = StaticCache(layers, foldable, tables)
        return Step(self._forward, static, len(first.coded), first.device)

    def _let_go(self, given: dict[str, Any]) -> None:
        """Of codes that a forward will move, lest they lie in memory twice."""
        cache = given.get("past_key_values")
        new = next(
            (x for x in map(given.get, ("input_ids", "inputs_embeds")) if x is not None), None
        )
        if not isinstance(cache, VQCache) or new is None:
            return
        held: _Held | None = cache.rows.steps.get(id(self))
        layers = list(cache.coded_layers.values())
        if held is None or not all(layer.is_initialized for layer in layers):
            return
        coded = max(layers[0].coded_at(layers[0].get_seq_length() + new.shape[1]))
        if any(store.capacity < coded for layer in layers for store in layer.stores):
            held.step = None


def _along_one_axis(positions: torch.Tensor) -> torch.Tensor | None:
    """Positions `[B, T]` of `[A, B, T]`; None where axes differ, as they do in images."""
    return positions[0] if bool((positions == positions[0]).all()) else None


def _autocast(device: torch.device) -> torch.dtype | None:
    enabled = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else None


def _all_real(mask: torch.Tensor | None, pads: list[int], length: int) -> bool:
    """Whether a mask hides nothing but the padding that is known."""
    if mask is None:
        return not any(pads)
    if mask.ndim != 2 or mask.shape[1] != length:
        return False
    mask = mask != 0  # sums of half precision would round
    counts = torch.stack([mask.sum(1), (mask.cumsum(1) == 0).sum(1)])
    real, padded = counts.tolist()  # of one wait for the device
    return bool(
        padded == pads and all(n + pad == length for n, pad in zip(real, pads, strict=True))
    )
