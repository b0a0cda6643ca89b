"""What a saved compressor and the model it serves must agree on."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from vqkv.attention import (
    attention_modules,
    cached_states,
    model_type,
    rotary_module,
    rotary_tables,
    takes_tables,
    text_config,
)
from vqkv.errors import ModelError
from vqkv.models import auto_class
from vqkv.rotation import Pairing, Pairs, Rotation, rope_pairs, rotary_function

#: Of a model whose attention rotates keys in ways of its own, which cannot be undone.
INSIDE = "inside attention"

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class RopeForm:
    """Rotary embedding of the compressed layers.

    Attributes:
        type: as transformers names it: default, linear, yarn, llama3, ...; `INSIDE`.
        theta: base of the frequencies; 0 for `INSIDE`.
        rotary_dim: channels of a head that are known to rotate.
        pairing: which of them rotate together.
        scaling: the other parameters of the type, sorted by name.
    """

    type: str
    theta: float
    rotary_dim: int
    pairing: Pairing
    scaling: tuple[tuple[str, Scalar | tuple[float, ...]], ...] = ()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RopeForm:
        """Inverse of `asdict`, also after a round trip through JSON."""
        scaling = tuple((name, _frozen(value)) for name, value in data["scaling"])
        return cls(**{**data, "scaling": scaling})


@dataclass(frozen=True)
class Geometry:
    """Shapes and rotary form of a model's KV cache.

    Attributes:
        model_type: family of the text decoder.
        layers: of the decoder.
        compressed: indices of the full-attention layers; others keep upstream's own cache.
        kv_heads: H.
        query_heads: Q.
        head_dim: D.
        qk_norm: whether keys are normed before they rotate.
        rope: None where keys do not depend on positions.
    """

    model_type: str
    layers: int
    compressed: tuple[int, ...]
    kv_heads: int
    query_heads: int
    head_dim: int
    qk_norm: bool
    rope: RopeForm | None

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> Geometry:
        """Geometry of the model that `config` describes, from its architecture without weights.

        Raises:
            ModelError: transformers cannot build the model, or layers differ in KV geometry.
        """
        text = config.get_text_config(decoder=True)
        # Of some families the text decoder is no model of its own.
        own = copy.deepcopy(text if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING else config)
        try:
            with torch.device("meta"):
                model = auto_class(own).from_config(
                    own, attn_implementation="eager", trust_remote_code=False
                )
        except Exception as error:
            raise ModelError(
                f"{text.model_type}: transformers cannot build this model from its config alone "
                f"({error}); load it and use Geometry.from_model"
            ) from error
        return cls.from_model(model)

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> Geometry:
        """Geometry of a model at hand.

        Raises:
            ModelError: layers differ in KV geometry, or keys differ from values, as in MLA.
        """
        config = text_config(model)
        modules = attention_modules(model)
        layer_types = get_layer_types_and_kwargs(config)[0]
        compressed = tuple(i for i, kind in enumerate(layer_types) if kind == "full_attention")
        if missing := [i for i in compressed if i not in modules]:
            raise ModelError(f"{config.model_type}: layers {missing} have no attention module")
        # Where nothing is compressed, the first layer still tells heads and head dim.
        probed = compressed or (min(modules),)
        widths = {i: _table_width(model, modules[i], i) for i in probed}
        shapes = {i: _kv_shape(model, modules[i], widths[i]) for i in probed}
        if len(set(shapes.values())) > 1:
            raise ModelError(
                f"{config.model_type}: layers differ in (KV heads, head dim): {shapes}; "
                "vqkv serves models whose full-attention layers are alike"
            )
        first = probed[0]
        kv_heads, head_dim = shapes[first]
        width = widths[first]
        return cls(
            model_type=config.model_type,
            layers=config.num_hidden_layers,
            compressed=compressed,
            kv_heads=kv_heads,
            query_heads=config.num_attention_heads,
            head_dim=head_dim,
            qk_norm=_has_key_norm(modules[first]),
            rope=_rope_of(config, layer_types[first], modules[first], width, head_dim),
        )

    @property
    def pairs(self) -> Pairs:
        """Channels of a head that rotate together; none without RoPE."""
        return () if self.rope is None else rope_pairs(self.rope.pairing, self.rope.rotary_dim)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Geometry:
        """Inverse of `to_dict`, also after a round trip through JSON."""
        rope = None if data["rope"] is None else RopeForm.from_dict(data["rope"])
        return cls(**{**data, "compressed": tuple(data["compressed"]), "rope": rope})

    def mismatches(self, other: Geometry) -> list[str]:
        """Every field that differs, as `name: mine != theirs`."""
        mine, theirs = _flat(self), _flat(other)
        return [
            f"{name}: {mine.get(name)} != {theirs.get(name)}"
            for name in mine | theirs
            if mine.get(name) != theirs.get(name)
        ]


def _flat(geometry: Geometry) -> dict[str, Any]:
    """Fields by name, those of the rotary form as `rope.name`."""
    rope = geometry.rope
    fields = asdict(geometry) | {"rope": None if rope is None else rope.type}
    return fields if rope is None else fields | {f"rope.{k}": v for k, v in asdict(rope).items()}


def _table_width(model: PreTrainedModel, attention: nn.Module, layer: int) -> int | None:
    """W of the rotary tables that a layer is handed; None without."""
    rotary = rotary_module(model)
    if rotary is None or not takes_tables(attention):
        return None
    rotary_function(attention)
    # A fresh one computes on the CPU, also for a model on the meta device.
    fresh = type(rotary)(rotary.config)
    positions = torch.zeros(1, 1, dtype=torch.int64)
    return rotary_tables(fresh, text_config(model), layer, positions, torch.float32)[0].shape[-1]


def _kv_shape(model: PreTrainedModel, attention: nn.Module, width: int | None) -> tuple[int, int]:
    """H and D of what a layer caches."""
    tokens = 2
    hidden = torch.zeros(
        1, tokens, text_config(model).hidden_size, device=model.device, dtype=model.dtype
    )
    tables = None if width is None else (hidden.new_ones(1, tokens, width),) * 2
    keys, values = cached_states(attention, hidden, tables)
    if keys.ndim != 4 or keys.shape != values.shape or keys.shape[2] != tokens:
        raise ModelError(
            f"{model_type(model)}: {type(attention).__name__} caches keys {tuple(keys.shape)} and "
            f"values {tuple(values.shape)}; vqkv needs both as [batch, heads, tokens, head dim], "
            "alike (multi-head latent attention is not supported)"
        )
    return keys.shape[1], keys.shape[3]


def _has_key_norm(attention: nn.Module) -> bool:
    """Whether the module norms keys, by a k_norm, k_layernorm, key_layernorm or qk_norm."""
    return any(
        "norm" in name and name.startswith(("k", "qk")) for name, _ in attention.named_children()
    )


def _rope_of(
    config: PreTrainedConfig, layer_type: str, module: nn.Module, width: int | None, head_dim: int
) -> RopeForm | None:
    if width is not None:
        return _rope_form(config, layer_type, Rotation(module, width, head_dim))
    # GPT-J makes tables of positions itself, RoFormer is handed other ones; what is added to scores
    # leaves keys as they are.
    named = (name for name in inspect.signature(module.forward).parameters if "pos" in name)
    inside = any(name not in ("position_embeddings", "position_bias") for name in named)
    return RopeForm(INSIDE, theta=0.0, rotary_dim=0, pairing="half") if inside else None


def _rope_form(config: PreTrainedConfig, layer_type: str, rotation: Rotation) -> RopeForm:
    parameters = config.rope_parameters
    parameters = dict(parameters.get(layer_type, parameters))
    parameters.pop("partial_rotary_factor", None)  # rotary_dim says it
    return RopeForm(
        type=parameters.pop("rope_type"),
        theta=float(parameters.pop("rope_theta")),
        rotary_dim=rotation.rotary_dim,
        pairing=rotation.pairing,
        scaling=tuple((name, _frozen(value)) for name, value in sorted(parameters.items())),
    )


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value
