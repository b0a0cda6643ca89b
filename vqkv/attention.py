"""The attention modules of a transformers model, and the states they would cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vqkv.errors import ModelError

#: Cosines and sines `[B, T, W]`, as a model's rotary module returns them.
Tables = tuple[torch.Tensor, torch.Tensor]

#: What the parameter for the cache is called in attention modules.
_CACHE_PARAMETERS = ("past_key_values", "layer_past")

#: What the projection after attention is called in attention modules.
_OUTPUT_PROJECTIONS = ("o_proj", "dense", "out_proj", "c_proj", "wo")


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The config of the text decoder, which multimodal models nest in their own."""
    return model.config.get_text_config(decoder=True)


def most_positions(config: PreTrainedConfig) -> int | None:
    """The positions that the text decoder was made for; None where its config sets no limit."""
    found: int | None = getattr(
        config.get_text_config(decoder=True), "max_position_embeddings", None
    )
    return found


def model_type(model: PreTrainedModel) -> str:
    """The family name of the text decoder, such as `llama` or `gemma3_text`."""
    return str(text_config(model).model_type)


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The modules that write to the cache, by layer index.

    Raises:
        ModelError: there is none, or two of them share a layer (as with cross-attention).
    """
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int) or "Attention" not in type(module).__name__:
            continue
        if cache_parameter(module) is None or _inside(module, found.get(layer)):
            continue
        if layer in found:
            raise ModelError(
                f"{model_type(model)}: layer {layer} has two modules that write to the cache, "
                f"{type(found[layer]).__name__} and {type(module).__name__}; "
                "decoder-only models have one"
            )
        found[layer] = module
    if not found:
        raise ModelError(
            f"{model_type(model)}: no attention module with a layer_idx and a "
            f"{' or '.join(_CACHE_PARAMETERS)} argument was found in {type(model).__name__}"
        )
    return found


def cache_parameter(module: nn.Module) -> str | None:
    """The name under which an attention module takes the cache."""
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in _CACHE_PARAMETERS if name in parameters), None)


def own_attention(module: nn.Module, implementation: str) -> Callable[..., Any]:
    """The attention function that `module` calls where its model has that implementation."""
    modeling = inspect.getmodule(type(module))
    # A modeling file may have functions of its own beside the shared ones, eager is always one.
    functions = getattr(modeling, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    eager: Any = getattr(modeling, "eager_attention_forward", None)
    own: Callable[..., Any] = functions.get_interface(implementation, eager)
    return own


def output_projection(module: nn.Module, channels: int) -> torch.Tensor:
    """The weight `[hidden, channels]` that attention's output goes through.

    Raises:
        ModelError: the module has no linear layer for it under a name that is known.
    """
    for name in _OUTPUT_PROJECTIONS:
        weight = getattr(getattr(module, name, None), "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 2 and weight.shape[1] == channels:
            return weight
    raise ModelError(
        f"{type(module).__name__} has no output projection of {channels} channels among "
        f"{', '.join(_OUTPUT_PROJECTIONS)}, so the cost of an error in its values is unknown: use "
        "transforms without a metric"
    )


def takes_tables(module: nn.Module) -> bool:
    """Whether an attention module is handed the rotary cosines and sines."""
    return "position_embeddings" in inspect.signature(module.forward).parameters


def argument(module: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The argument `name` of a call of `module`, by keyword or by position; None if not given."""
    if name in kwargs:
        return kwargs[name]
    names = list(inspect.signature(module.forward).parameters)[: len(args)]
    return args[names.index(name)] if name in names else None


def rotary_module(model: PreTrainedModel) -> nn.Module | None:
    """What turns positions into cosines and sines for the text decoder; None without RoPE."""
    first = next(iter(attention_modules(model).values()))
    # A model of several modalities may have several: the innermost around the decoder's layers.
    around = [module for module in model.modules() if _inside(first, module)]
    found = [getattr(module, "rotary_emb", None) for module in around]
    return next((module for module in reversed(found) if isinstance(module, nn.Module)), None)


def position_axes(rotary: nn.Module | None, config: PreTrainedConfig, layer: int) -> int:
    """How many axes a multimodal model's positions count along; 0 for a model of text alone."""
    sections = getattr(rotary, "mrope_section", None)
    if isinstance(sections, dict):
        sections = sections.get(config.layer_types[layer])
    return len(sections or ())


def rotary_tables(
    rotary: nn.Module,
    config: PreTrainedConfig,
    layer: int,
    positions: torch.Tensor,
    dtype: torch.dtype,
) -> Tables:
    """Cosines and sines `[B, T, W]` of one layer at integer positions.

    Positions are `[B, T]`; `[B, T, A]` where a multimodal model counts along A axes (time, height,
    width).

    Raises:
        ModelError: the module computes none for that layer.
    """
    like = torch.empty(0, device=positions.device, dtype=dtype)
    by_type = "layer_type" in inspect.signature(rotary.forward).parameters
    try:
        kind = {"layer_type": config.layer_types[layer]} if by_type else {}
        axes = position_axes(rotary, config, layer)
        if positions.ndim == 3:
            positions = positions.movedim(2, 0)
        elif axes:
            # Transformers takes `[B, T]` here, too, but not in all versions.
            positions = positions.expand(axes, -1, -1)
        # `forward`, not the module: hooks are for real forwards.
        cos, sin = rotary.forward(like, positions, **kind)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"{config.model_type}: {type(rotary).__name__} computes no cosines and sines for layer "
            f"{layer}: {error!r}"
        ) from error
    return cos, sin


@torch.no_grad()
def cached_states(
    module: nn.Module, hidden: torch.Tensor, tables: Tables | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[B, H, T, D]` that `module` would cache for hidden states `[B, T, E]`.

    The module stops where it hands them to the cache, so attention itself never runs. Works on the
    meta device, where only shapes come back.

    Raises:
        ModelError: the module never gets that far.
    """
    try:
        run_alone(module, hidden, tables, _Recorder())
    except _Recorded as record:
        return record.keys, record.values
    except Exception as error:
        raise ModelError(
            f"{type(module).__name__}: could not find out what it caches: {error}"
        ) from error
    raise ModelError(f"{type(module).__name__} never hands keys and values to the cache")


def run_alone(
    module: nn.Module, hidden: torch.Tensor, tables: Tables | None, cache: StandIn
) -> None:
    """Run an attention module on hidden states `[B, T, E]`, beside its model."""
    name = cache_parameter(module)
    assert name is not None, "attention_modules only lists modules that take a cache"
    parameters = inspect.signature(module.forward).parameters
    first, *others = parameters.values()
    # What a family demands beside these (an ALiBi bias, a residual) is used after the cache, if
    # at all.
    call: dict[str, Any] = {
        p.name: None
        for p in others
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }
    call |= {first.name: hidden, name: cache}
    if "position_ids" in parameters:
        call["position_ids"] = torch.arange(hidden.shape[1], device=hidden.device)[None]
    if takes_tables(module):
        call["position_embeddings"] = tables
    module.forward(**call)


class StandIn:
    """Stands in for an empty cache, for one update."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> Any:
        """What is said in place of keys and values."""
        raise NotImplementedError

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before."""
        return 0


class _Recorded(BaseException):
    """Carries states out of an attention module. Not an Exception: no module may swallow it."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys = keys
        self.values = values


class _Recorder(StandIn):
    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> NoReturn:
        raise _Recorded(keys, values)


def _inside(module: nn.Module, outer: nn.Module | None) -> bool:
    return outer is not None and any(child is module for child in outer.modules())
