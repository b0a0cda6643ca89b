"""The attention function that reads codes, and the model's own around it.

A layer is read in the first of these ways that takes it:

- all its coded tokens at once by a kernel of `attend_codes`, see `vqkv.cache.fused`;
- block by block by a kernel of `attend`. Values of a block are decoded, and so are its keys, but
  where they commute with RoPE and a table pays, see `vqkv.cache.commuted`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    eager_mask,
    flash_attention_mask,
    sdpa_mask,
)

from vqkv.attention import (
    StandIn,
    attention_modules,
    model_type,
    rotary_module,
    rotary_tables,
    run_alone,
    takes_tables,
    text_config,
)
from vqkv.cache.commuted import commuting_slots, read_commuting
from vqkv.cache.fused import fused_attention
from vqkv.cache.layer import CodedStates, VQLayer
from vqkv.cache.masks import visible_slots
from vqkv.cache.static import StaticStates
from vqkv.errors import KernelError, ModelError
from vqkv.exchange import AttentionExchange
from vqkv.kernels.attend import Block, Reading, attend

log = logging.getLogger(__name__)

#: Slots decoded at a time.
BLOCK_TOKENS = 1024

#: What no kernel here computes: arguments of attention, and the module's attribute for each.
VARIANTS = {"softcap": "attn_logit_softcapping", "position_bias": "position_bias"}

#: Mask functions of transformers whose masks `visible_slots` can read.
_MASKS = (sdpa_mask, eager_mask, flash_attention_mask)


class CodedAttention(AttentionExchange):
    """A model's attention that reads codes where a layer hands it some, and else is its own.

    Args:
        model: a causal language model of transformers.
        layers: the compressed layers.

    Raises:
        KernelError: a compressed layer attends in a way that no kernel here computes, or the
            model's implementation has masks that cannot be read.
        ModelError: transformers does not tell of the model's decoder.
    """

    def __init__(self, model: PreTrainedModel, layers: Iterable[int]) -> None:
        super().__init__(model, self._attend, "it cannot read codes: use read='decode'")
        family, modules = model_type(model), attention_modules(model)
        self._model = model
        self._layers = {layer: modules[layer] for layer in layers}
        for layer, module in self._layers.items():
            for variant, attribute in VARIANTS.items():
                if getattr(module, attribute, None) is not None:
                    raise _not_computed(f"{family}: layer {layer}", variant)
        if ALL_MASK_ATTENTION_FUNCTIONS.get(self.original) not in _MASKS:
            raise KernelError(
                f"{family}: attention on codes cannot read the masks of the model's "
                f"attention implementation {self.original!r}: load the model with "
                "attn_implementation='sdpa', or use read='decode'"
            )

    def __enter__(self) -> Self:
        """Raises ModelError where codes would not get to where the model attends."""
        super().__enter__()
        try:
            # Layers of one class treat what a cache returns alike.
            for layer in {type(m): layer for layer, m in self._layers.items()}.values():
                self._check_handed_on(layer)
        except BaseException:
            self._undo()
            raise
        return self

    @torch.no_grad()
    def _check_handed_on(self, layer: int) -> None:
        """Run a layer's attention on a token, up to where it attends."""
        module, config = self._layers[layer], text_config(self._model)
        weight = next(module.parameters())
        device = weight.device
        if device.type == "meta":  # where accelerate keeps weights of others, a forward brings them
            return
        # Of quantized weights, embeddings say what hidden states are.
        embeddings = next(self._model.get_input_embeddings().parameters())
        dtype = weight.dtype if weight.is_floating_point() else embeddings.dtype
        hidden = torch.zeros(1, 1, config.hidden_size, device=device, dtype=dtype)
        tables, rotary = None, rotary_module(self._model)
        if rotary is not None and takes_tables(module):
            first = torch.zeros(1, 1, dtype=torch.int64, device=device)
            tables = rotary_tables(rotary, config, layer, first, dtype)
        reason: Exception | None = None
        probing = _Probing()
        try:
            run_alone(module, hidden, tables, probing)
        except _Reached:
            return
        except Exception as error:
            if not probing.updated:
                log.info("layer %d cannot run alone, so it was not tried: %s", layer, error)
                return
            what, reason = "changes what a cache returns before it attends", error
        else:
            what = "does not attend through its model's attention function"
        raise ModelError(
            f"{self._family}: {type(module).__name__} {what}, so {self._consequence}"
        ) from reason

    def _attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: Any,
        value: Any,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if isinstance(key, _Probe):
            raise _Reached
        if isinstance(key, CodedStates | StaticStates):
            return coded_attention(module, query, key, attention_mask, *args, **kwargs)
        return self.own(module)(module, query, key, value, attention_mask, *args, **kwargs)


class _Probe:
    """In place of keys and values, as `CodedStates` will be."""


class _Probing(StandIn):
    updated = False

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[_Probe, _Probe]:
        self.updated = True
        return _Probe(), _Probe()


class _Reached(BaseException):
    """A probe has got to where a model attends. Not an Exception: no module may swallow it."""


def coded_attention(
    module: nn.Module,
    query: torch.Tensor,
    states: CodedStates | StaticStates,
    mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention `[B, t, Q, D]` of queries `[B, Q, t, D]` over all slots of a layer.

    Transformers calls null scores (see `Rest`) `s_aux`.

    Raises:
        KernelError: the model asks for a variant of attention that no kernel here computes.
    """
    for variant in VARIANTS:
        if kwargs.get(variant) is not None:
            raise _not_computed(type(module).__name__, variant)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(states, StaticStates):
        return states.layer.read(query, scale, s_aux).transpose(1, 2).contiguous(), None
    layer = states.layer
    output = fused_attention(layer, query, scale, mask, s_aux)
    if output is None:
        layer.share_history()
        visible = visible_slots(mask, query.shape[2], layer.get_seq_length(), query.device)
        reading = Reading(layer.key_codec.layout, query.shape[1] // layer.key_codec.heads)
        blocks = _blocks(layer, visible, query.shape[2] * reading.readers)
        output = attend(query, blocks, scale, reading, s_aux)
    layer.finish()
    return output.transpose(1, 2).contiguous(), None


def _not_computed(where: str, variant: str) -> KernelError:
    return KernelError(
        f"{where} attends with {variant}, which attention on codes does not compute: use "
        "read='decode'"
    )


def _blocks(layer: VQLayer, visible: torch.Tensor, rows: int) -> Iterator[Block]:
    """All slots in runs: coded ones a block at a time, then what is exact in every row.

    Keys are decoded, but where a table of the `rows` queries of a KV head pays.
    """
    low, high = commuting_slots(layer, rows)
    for start, stop in _runs([0, low, high, layer.exact_from, layer.get_seq_length()]):
        coded = low <= start < high
        keys, values = read_commuting(layer, start, stop) if coded else layer.read(start, stop)
        yield Block(keys, values, visible[..., start:stop])


def _runs(edges: list[int]) -> Iterator[tuple[int, int]]:
    """Runs of up to `BLOCK_TOKENS` slots that no edge lies inside of."""
    for first, last in pairwise(edges):
        for start in range(first, last, BLOCK_TOKENS):
            yield start, min(start + BLOCK_TOKENS, last)
