"""Tiny models with random weights, one per way that families differ in attention."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from vqkv.models import auto_class

_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_PARTIAL = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5}
_YARN = {
    "rope_theta": 10000.0,
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}

#: Family name: transformers model type, and what differs from `_COMMON`.
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-yarn": ("llama", {"rope_parameters": _YARN}),
    "llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_theta": 500000.0,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": 16}),
    "gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 3,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    # Soft-capped scores, in layers of both kinds.
    "gemma2": (
        "gemma2",
        {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "olmo2": ("olmo2", {}),
    "phi3": ("phi3", {}),
    "glm": ("glm", {"rope_parameters": _PARTIAL}),
    "cohere": ("cohere", {}),
    "stablelm": ("stablelm", {"rope_parameters": _PARTIAL | {"partial_rotary_factor": 0.25}}),
    "gpt_neox": ("gpt_neox", {"rope_parameters": _PARTIAL | {"partial_rotary_factor": 0.25}}),
    "gpt_oss": (
        "gpt_oss",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "num_local_experts": 4,
            "rope_parameters": _YARN,
        },
    ),
    # Every layer but the last rotates.
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 1}),
}

ROPE_FAMILIES = tuple(name for name in _FAMILIES if name != "gpt2")

#: Families whose positions count along axes, as images have several.
_AXES = {"rope_theta": 10000.0, "rope_type": "default"}
_TEXT_OF_SEVERAL: dict[str, dict[str, Any]] = {
    "qwen3_vl": {"rope_parameters": _AXES | {"mrope_section": [4, 2, 2]}},
    "qwen2_5_vl": {"rope_parameters": _AXES | {"mrope_section": [2, 3, 3]}},
    # Most layers have linear attention, which keeps a state instead of a cache.
    "qwen3_5": {
        "rope_parameters": _AXES | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
}
MULTIMODAL_FAMILIES = tuple(_TEXT_OF_SEVERAL)
#: Stands for a patch of four of an image, which `IMAGE_START` comes before.
IMAGE_TOKEN, IMAGE_START = 90, 91
_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 2,
    "temporal_patch_size": 1,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
}


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """The config of `tiny_model`."""
    if family in MULTIMODAL_FAMILIES:
        text = _COMMON | _TEXT_OF_SEVERAL[family] | overrides
        tokens = {"image_token_id": IMAGE_TOKEN, "vision_start_token_id": IMAGE_START}
        return AutoConfig.for_model(family, text_config=text, vision_config=_VISION, **tokens)
    model_type, own = _FAMILIES[family]
    common = {} if family == "gpt2" else _COMMON
    settings = {"vocab_size": 97, "eos_token_id": None} | common | own | overrides
    return AutoConfig.for_model(model_type, **settings)


def tiny_model(
    family: str, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A seeded model of 2 or 3 layers, head dim 16, in eval mode.

    Args:
        family: of `ROPE_FAMILIES` or `MULTIMODAL_FAMILIES`, or gpt2.
        dtype: of the weights.
        **overrides: fields of its text's config.
    """
    config = tiny_config(family, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = auto_class(config).from_config(config, dtype=dtype)
        # Fresh norms and biases are ones and zeros, which hides mistakes in what comes after them.
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(("bias", "sinks")):
                parameter.data += 0.1 * torch.randn_like(parameter)
    model.generation_config.pad_token_id = 0
    model.eval()
    return model
