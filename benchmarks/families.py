"""Which families of transformers a compressed cache serves, and how their codes can be read.

    python -m benchmarks.families --out benchmarks/results/families.json
    python -m benchmarks.families llama qwen3

Of every type of decoder that transformers lists, a small model with random weights continues two
prompts, one of them padded, with its exact cache and with ours. Our codes are exact too here
(`identity`), so that the text has to be the same; keys are coded before RoPE and after it, and
codes are decoded to be read, or read in attention, block by block. A model that sees gets text.
Families of which no small model is known are left out, with the reason.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import warnings
from collections.abc import Iterator, Mapping
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from vqkv import Geometry, KVCompressor, attach
from vqkv.errors import VQKVError
from vqkv.models import auto_class
from vqkv.provenance import write
from vqkv.scheme_files import scheme_from_dict

PROMPT, NEW, PADDING = 60, 90, 7
#: Seconds for a family, and parameters of a model that is small enough.
LIMIT, MOST_PARAMETERS = 240, 30_000_000
WAYS: tuple[tuple[Literal["pre", "post"], Literal["decode", "attend"]], ...] = (
    *(("pre", "decode"), ("pre", "attend")),
    *(("post", "decode"), ("post", "attend")),
)

#: A family's config gets those of these fields that it has.
SMALL: dict[str, Any] = {
    **{"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None},
    **{"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
    **{"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 64, "n_positions": 256},
    **{"d_model": 64, "n_layers": 2, "n_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 64},
    **{"rotary_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 16},
    **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4},
    **{"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32},
    **{"shared_expert_intermediate_size": 32, "mamba_n_groups": 1, "n_groups": 1},
    **{"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_expand": 2},
    **{"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16},
    **{"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 16},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 2},
    **{"linear_key_head_dim": 16, "linear_value_head_dim": 16},
}
_AXES = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
_HALF_AXES = _AXES | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
#: What else some families' text needs.
OWN: dict[str, dict[str, Any]] = {
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16},
    "falcon_h1": {"mamba_d_ssm": 128},
    "laguna": {"sliding_window": 16},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [32, 32],
        "rope_parameters": _AXES | {"mrope_section": [3, 3, 2]},
    },
    **{f"{name}_text": {"rope_parameters": _AXES} for name in ("qwen2_5_vl", "glmga", "glm_ocr")},
    **{f"{name}_text": {"rope_parameters": _HALF_AXES} for name in ("glm4v", "glm4v_moe")},
    "paddleocr_vl_text": {"rope_parameters": _AXES},
    "hunyuan_vl_text": {"rope_parameters": _AXES},
}
VISION: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "depth": 1},
    **{"num_attention_heads": 2, "num_heads": 2, "image_size": 28, "patch_size": 14},
    **{"out_hidden_size": 64, "deepstack_visual_indexes": [0]},
}


def families() -> list[str]:
    """Types of models that continue text, in order."""
    listed = (*MODEL_FOR_CAUSAL_LM_MAPPING, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    return sorted({config.model_type for config in listed if config.model_type})


def small_config(family: str) -> PreTrainedConfig:
    """Of two layers of each kind that the family has, beside its usual settings."""
    usual = AutoConfig.for_model(family)
    text = usual.get_text_config(decoder=True)
    if text is usual:
        return AutoConfig.for_model(family, **_small_text(text))
    parts = {"text_config": {"model_type": text.model_type, **_small_text(text)}}
    if (vision := getattr(usual, "vision_config", None)) is not None:
        parts["vision_config"] = {"model_type": vision.model_type, **_fitting(VISION, vision)}
    return AutoConfig.for_model(family, **parts)


def _small_text(usual: PreTrainedConfig) -> dict[str, Any]:
    settings = _fitting(SMALL, usual)
    if "kv_lora_rank" in settings:  # latent attention has as many keys as queries
        settings |= {"num_key_value_heads": settings["num_attention_heads"]}
        settings.pop("head_dim", None)
    kinds = list(dict.fromkeys(getattr(usual, "layer_types", None) or ()))
    if kinds and "full_attention" not in kinds and usual.model_type not in OWN:
        kinds.append("full_attention")
    if len(kinds) > 1 and _settable(usual, "layer_types"):
        settings |= {"layer_types": kinds * 2, "num_hidden_layers": 2 * len(kinds)}
    if hasattr(usual, "sliding_window"):
        settings["sliding_window"] = 16 if len(kinds) > 1 else None
    return settings | OWN.get(usual.model_type, {})


def _fitting(settings: Mapping[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if _settable(config, name)}


def _settable(config: PreTrainedConfig, name: str) -> bool:
    of_class = getattr(type(config), name, None)
    try:
        getattr(config, name)
    except Exception:  # not there, or another one in each layer
        return False
    return not isinstance(of_class, property) or of_class.fset is not None


def small_model(family: str) -> PreTrainedModel:
    """With random weights; LookupError, with the reason, where none can be made."""
    try:
        config = small_config(family)
        with torch.device("meta"):
            sizes = [p.numel() for p in auto_class(config).from_config(config).parameters()]
        if sum(sizes) > MOST_PARAMETERS:
            raise LookupError(f"{sum(sizes):,} parameters with small settings")
        torch.manual_seed(0)
        config = small_config(family)  # another one: some models change theirs
        model: PreTrainedModel = auto_class(config).from_config(config).eval()
    except Exception as error:
        raise LookupError(_line(error)) from error
    if config.is_encoder_decoder or hasattr(config, "type_vocab_size"):
        raise LookupError("an encoder, or a decoder that attends to one")
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):  # fresh ones are ones and zeros
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


def identity(rope: str) -> dict[str, Any]:
    """A scheme whose codes are the states themselves."""
    grouping = {"type": "contiguous", "dim": 4}
    stream = {"grouping": grouping, "quantizer": {"type": "identity"}}
    return {
        "name": f"identity-{rope}",
        "keys": {"rope": rope, **stream},
        "values": stream,
        "residency": {"sinks": 3, "window": 10},
    }


def measure(family: str) -> dict[str, Any]:
    """How each way to code and read goes: `same`, `differs`, or why not."""
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    try:
        model: Any = small_model(family)
    except LookupError as error:
        return {"family": family, "left_out": str(error)}
    ids = torch.randint(3, 90, (2, PROMPT), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0

    def text(cache: Any) -> torch.Tensor:
        found: torch.Tensor = model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, do_sample=False
        )
        return found

    try:
        exact = text(DynamicCache(config=model.config.get_text_config(decoder=True)))
    except Exception as error:
        return {"family": family, "left_out": f"with the exact cache: {_line(error)}"}
    try:
        geometry = Geometry.from_model(model)
        found = {"layers": geometry.layers, "compressed": len(geometry.compressed)}
    except VQKVError as error:
        return {"family": family, "refused": _line(error)}

    def way(rope: str, read: Literal["decode", "attend"]) -> str:
        try:
            compressor = KVCompressor(scheme_from_dict(identity(rope)), geometry)
            with attach(model, compressor, read=read) as attached:
                cache = attached.new_cache()
                same = torch.equal(text(cache), exact)
            coded = all(min(layer.coded) >= 64 for layer in cache.coded_layers.values())
            return ("same" if coded else "nothing was coded") if same else "differs"
        except VQKVError as error:
            return _line(error)
        except Exception as error:
            return f"fails: {_line(error)}"

    ways = {f"{rope}/{read}": way(rope, read) for rope, read in WAYS}
    return {"family": family, **found, "ways": ways}


def _line(error: BaseException) -> str:
    first, *others = f"{error}".strip().splitlines() or [type(error).__name__]
    return f"{first} {others[0].strip()}" if first.endswith(":") and others else first


def apart(family: str) -> dict[str, Any]:
    """`measure` in a process of its own, which may crash or hang."""
    context = multiprocessing.get_context("fork")
    queue: SimpleQueue[dict[str, Any]] = context.SimpleQueue()
    process = context.Process(target=lambda: queue.put(measure(family)))
    process.start()
    process.join(LIMIT)
    if process.is_alive():
        process.kill()
        return {"family": family, "left_out": f"it takes more than {LIMIT} seconds"}
    if process.exitcode:
        return {"family": family, "left_out": f"its process ended with {process.exitcode}"}
    return queue.get()


def _rows(found: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for row in found:
        why = row.get("left_out") or row.get("refused")
        yield (row["family"], *(row["ways"].values() if why is None else itertools.repeat(why, 4)))


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("family", nargs="*", help="all by default")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = arguments.family or families()
    found = [apart(family) for family in track(chosen, "families", transient=True)]
    settings = {"prompt": PROMPT, "new": NEW, "padding": PADDING}
    if arguments.out is not None:
        write(arguments.out, {"settings": settings, "rows": found})
    table = Table("family", *(f"{rope}/{read}" for rope, read in WAYS))
    for row in _rows(found):
        table.add_row(*(cell[:60] for cell in row))
    Console().print(table)


if __name__ == "__main__":
    main()
