from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from tests.tiny_models import MULTIMODAL_FAMILIES, ROPE_FAMILIES, tiny_config, tiny_model
from vqkv.errors import ModelError
from vqkv.geometry import Geometry


@pytest.mark.parametrize("family", [*ROPE_FAMILIES, "gpt2"])
def test_config_and_model_agree_on_what_the_cache_holds(family: str) -> None:
    model = tiny_model(family)
    geometry = Geometry.from_config(model.config)
    assert geometry == Geometry.from_model(model)
    with torch.no_grad():
        cache = model(torch.tensor([[3, 4, 5]]), use_cache=True).past_key_values
    assert geometry.layers == len(cache.layers)
    assert cache.layers[0].keys.shape == (1, geometry.kv_heads, 3, geometry.head_dim)
    assert geometry.compressed == tuple(
        i for i, layer in enumerate(cache.layers) if not layer.is_sliding
    )


@pytest.mark.parametrize("family", MULTIMODAL_FAMILIES)
def test_config_and_model_agree_where_a_model_sees(family: str) -> None:
    config = tiny_config(family)
    seeing = AutoModelForImageTextToText.from_config(config)
    assert Geometry.from_config(config) == Geometry.from_model(seeing)


@pytest.mark.parametrize("family", [*ROPE_FAMILIES, *MULTIMODAL_FAMILIES, "gpt2"])
def test_survives_json(family: str) -> None:
    geometry = Geometry.from_config(tiny_config(family))
    assert Geometry.from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry


def test_compressed_layers_are_those_with_full_attention() -> None:
    assert Geometry.from_config(tiny_config("gemma3")).compressed == (1,)
    assert Geometry.from_config(tiny_config("mistral")).compressed == ()
    assert Geometry.from_config(tiny_config("mistral", sliding_window=None)).compressed == (0, 1)


@pytest.mark.parametrize(
    ("family", "qk_norm"),
    [("llama", False), ("qwen2", False), ("qwen3", True), ("gemma3", True), ("olmo2", True)],
)
def test_qk_norm(family: str, qk_norm: bool) -> None:
    assert Geometry.from_config(tiny_config(family)).qk_norm == qk_norm


def test_rotary_form() -> None:
    yarn = Geometry.from_config(tiny_config("llama-yarn")).rope
    assert yarn is not None
    assert (yarn.type, yarn.theta, yarn.rotary_dim, yarn.pairing) == ("yarn", 1e4, 16, "half")
    assert yarn.scaling == (("factor", 4.0), ("original_max_position_embeddings", 64))
    glm = Geometry.from_config(tiny_config("glm"))
    assert glm.rope is not None
    assert (glm.rope.rotary_dim, glm.rope.pairing) == (8, "interleaved")
    assert glm.pairs == ((0, 1), (2, 3), (4, 5), (6, 7))
    gemma3 = Geometry.from_config(tiny_config("gemma3")).rope
    assert gemma3 is not None
    assert gemma3.theta == 1e6  # of the full-attention layers
    gpt2 = Geometry.from_config(tiny_config("gpt2"))
    assert gpt2.rope is None
    assert gpt2.pairs == ()


@pytest.mark.parametrize(("family", "text"), [("gemma3", "gemma3"), ("llava", "llama")])
def test_text_part_of_a_multimodal_config(family: str, text: str) -> None:
    inner = tiny_config(text)
    config = AutoConfig.for_model(family, text_config=inner.to_dict())
    assert Geometry.from_config(config) == Geometry.from_config(inner)


def test_asking_changes_neither_config_nor_seed() -> None:
    config = tiny_config("llama", dtype="bfloat16")
    before, state = copy.deepcopy(vars(config)), torch.get_rng_state()
    Geometry.from_config(config)
    assert vars(config) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_mismatches_show_both_sides() -> None:
    ours = Geometry.from_config(tiny_config("llama"))
    theirs = Geometry.from_config(tiny_config("llama3", num_key_value_heads=1))
    assert ours.mismatches(ours) == []
    found = ours.mismatches(theirs)
    assert "kv_heads: 2 != 1" in found
    assert "rope.theta: 10000.0 != 500000.0" in found
    assert "rope: default != llama3" in found
    assert not any(line.startswith(("layers", "head_dim", "rope.rotary_dim")) for line in found)
    assert "rope: default != None" in ours.mismatches(replace(ours, rope=None))


def test_latent_attention_is_refused() -> None:
    config = AutoConfig.for_model(
        "deepseek_v3",
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with pytest.raises(ModelError, match=r"deepseek_v3.*DeepseekV3Attention.*latent"):
        Geometry.from_config(config)


def test_families_that_rotate_otherwise_are_refused() -> None:
    with pytest.raises(ModelError, match="Llama4TextAttention has no apply_rotary_pos_emb"):
        Geometry.from_config(AutoConfig.for_model("llama4_text", num_hidden_layers=4))


def test_models_without_attention_are_refused() -> None:
    config = AutoConfig.for_model("mamba", vocab_size=97, hidden_size=32, num_hidden_layers=1)
    with pytest.raises(ModelError, match="mamba: no attention module"):
        Geometry.from_config(config)


def test_models_that_transformers_cannot_build_are_refused() -> None:
    with pytest.raises(ModelError, match="vit"):
        Geometry.from_config(AutoConfig.for_model("vit"))
