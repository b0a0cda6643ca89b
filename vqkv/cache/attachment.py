"""Attaching a compressor to a model: what a cache cannot see by itself.

A cache sees keys after RoPE and slots without padding. An attached model also tells it positions,
padding, and how to take RoPE off and on; and it can let attention read codes.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from vqkv.artefact import check_fits
from vqkv.attention import argument, attention_modules, cache_parameter
from vqkv.cache.before_use import BeforeUseCache
from vqkv.cache.coded_attention import CodedAttention
from vqkv.cache.fused import not_fused
from vqkv.cache.rope import ForwardCapture, RotaryAdapter
from vqkv.cache.rows import Rows
from vqkv.cache.steps import DecodingSteps
from vqkv.cache.vqcache import VQCache
from vqkv.compressor import KVCompressor
from vqkv.errors import KernelError, ModelError
from vqkv.kernels.attend import Reading
from vqkv.kernels.select import select

log = logging.getLogger(__name__)

Read = Literal["auto", "decode", "attend"]


class Attachment:
    """What `attach` yields: makes caches for the attached model.

    Attributes:
        read: how attention reads codes, `"decode"` or `"attend"`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        compressor: KVCompressor,
        adapter: RotaryAdapter | None,
        capture: ForwardCapture,
        read: Read,
    ) -> None:
        self.model = model
        self.compressor = compressor
        self.read = read
        self._adapter = adapter
        self._capture = capture
        self._served: weakref.WeakSet[Rows] = weakref.WeakSet()

    def new_cache(self) -> VQCache:
        """An empty cache, to pass as `past_key_values`."""
        return VQCache(self.compressor, self.model.config)

    def introduce(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Forward pre-hook of the first compressed layer: tell the forward's cache of its rows.

        Padding is told to caches of other compressors too: it is the same for all, and none may
        be coded. The rest belongs to this attachment's compressor.
        """
        name = cache_parameter(module)
        cache = None if name is None else argument(module, name, args, kwargs)
        if not isinstance(cache, VQCache | BeforeUseCache):
            return
        padding = self._capture.left_padding
        pads = None if padding is None else padding.tolist()
        if pads is not None and isinstance(cache, VQCache):
            cache.check_padding(pads)
        rows, mine = cache.rows, cache.compressor is self.compressor
        rows.note(
            start=cache.get_seq_length(self.compressor.geometry.compressed[0]),
            positions=self._capture.positions if mine and self._adapter is not None else None,
            pads=pads,
        )
        if mine:
            rows.rotary = self._adapter
            rows.attend = self.read == "attend"
            self._served.add(rows)

    def withdraw(self) -> None:
        """Caches outlive the attachment; what belongs to the model does not."""
        for rows in self._served:
            rows.rotary, rows.attend = None, False
            rows.forget_readings()


@contextmanager
def attach(
    model: PreTrainedModel,
    compressor: KVCompressor,
    *,
    read: Read = "auto",
    graphs: bool = False,
) -> Iterator[Attachment]:
    """Let caches of `compressor` see positions, padding and RoPE of `model` within a block.

    Needed by pre-RoPE schemes and for left-padded batches. Undone when the block ends, by an
    exception too. A model may have several compressors attached: each serves the caches that were
    made with it.

    Args:
        model: a causal language model of transformers.
        compressor: fitted, or data-free.
        read: `"decode"` decodes a layer's history for whatever attention the model uses;
            `"attend"` lets attention read the codes, for up to 16 query rows at a time: by a fused
            kernel, else block by block. `"auto"` attends where a fused kernel takes every layer's
            codes and the model lets it, and decodes elsewhere. A layer of each class is run on one
            token to see whether it does. Where positions skip, or an image's count along several
            axes, keys coded before RoPE are read block by block even then.
        graphs: decoding steps are captured as a CUDA graph and replayed, so that launching kernels
            takes no time: see `vqkv.cache.steps`. Model and compressor stay as they are meanwhile.

    Raises:
        ArtefactError: the compressor is for another geometry, norm or RoPE.
        ModelError: the scheme needs pre-RoPE keys and the family cannot give them, or
            `read="attend"` and the family's attention cannot be exchanged.
        KernelError: `read="attend"` and no kernel attends on this scheme's codes, or in the way
            that the model does; or `graphs` are asked for without a GPU, or where codes are
            decoded to be read.
    """
    check_fits(
        compressor.geometry, compressor.provenance.base_model, model.config, repr(compressor)
    )
    layers = compressor.geometry.compressed
    if read == "attend":
        readers = compressor.geometry.query_heads // compressor.geometry.kv_heads
        for (_, stream), codec in compressor.codecs():
            if stream == "keys":
                select("attend", Reading(codec.layout, readers), model.device)
    adapter = RotaryAdapter(model, layers) if compressor.pre_rope else None
    with ForwardCapture(model, adapter) as capture, ExitStack() as stack:
        read = _exchange(stack, model, compressor, read)
        if graphs:
            stack.enter_context(_steps(model, compressor, read))
        attachment = Attachment(model, compressor, adapter, capture, read)
        first = attention_modules(model)[layers[0]]
        hook = first.register_forward_pre_hook(attachment.introduce, with_kwargs=True)
        try:
            yield attachment
        finally:
            hook.remove()
            attachment.withdraw()


def _steps(model: PreTrainedModel, compressor: KVCompressor, read: Read) -> DecodingSteps:
    reason = None
    if model.device.type != "cuda":
        reason = f"the model is on {model.device}"
    elif len({parameter.device for parameter in model.parameters()}) > 1:
        reason = "the model is on several devices"
    elif read != "attend":
        reason = not_fused(compressor, model.device) or "codes are decoded for the model's own"
    elif len(compressor.geometry.compressed) < compressor.geometry.layers:
        reason = "layers that are not compressed have caches of their own"
    if reason is not None:
        raise KernelError(f"graphs are of a GPU's fused attention on codes, and {reason}")
    return DecodingSteps(model, compressor)


def _exchange(
    stack: ExitStack, model: PreTrainedModel, compressor: KVCompressor, read: Read
) -> Read:
    """Let the model's attention read codes within `stack` where it should; returns how it reads."""
    if read == "auto":
        reason = not_fused(compressor, model.device)
        if reason is not None:
            log.info("%s is decoded to be read: %s", compressor, reason)
            return "decode"
    if read == "decode":
        return read
    try:
        stack.enter_context(CodedAttention(model, compressor.geometry.compressed))
    except (KernelError, ModelError) as error:
        if read == "attend":
            raise
        log.info("%s is decoded to be read: %s", compressor, error)
        return "decode"
    return "attend"
