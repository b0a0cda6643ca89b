"""Attaching and detaching; reading before use."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import accelerate  # type: ignore[import-untyped]
import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
)
from transformers.models.llama import modeling_llama

from tests.cache.compressors import compressor_for, random_ids
from tests.tiny_models import tiny_model
from vqkv.cache import BeforeUseCache, attach
from vqkv.cache.coded_attention import coded_attention
from vqkv.cache.layer import CodedStates
from vqkv.cache.masks import visible_slots
from vqkv.cache.rope import RotaryAdapter
from vqkv.errors import ArtefactError, CacheError, KernelError, ModelError
from vqkv.kernels import recording


@pytest.fixture
def model() -> Any:
    return tiny_model("llama", max_position_embeddings=1024)


def traces(model: Any) -> tuple[Any, ...]:
    """What attaching changes."""
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    registered = set(AttentionInterface()), set(AttentionMaskInterface())
    return hooks, model.config._attn_implementation, registered


def test_it_undoes_itself(model: Any) -> None:
    before = traces(model)
    with attach(model, compressor_for(model), read="attend"):
        assert traces(model)[0] > before[0]
        assert model.config._attn_implementation.startswith("vqkv")
    assert traces(model) == before


def test_it_undoes_itself_after_an_exception(model: Any) -> None:
    before = traces(model)
    with pytest.raises(ZeroDivisionError), attach(model, compressor_for(model), read="attend"):
        1 / 0  # noqa: B018
    assert traces(model) == before


def test_two_attached_models_at_once(model: Any) -> None:
    other = tiny_model("qwen3", max_position_embeddings=1024)
    ids = random_ids(1, 150)
    with (
        attach(model, compressor_for(model, quantizer="identity"), read="attend") as first,
        attach(other, compressor_for(other, quantizer="identity")) as second,
        torch.no_grad(),
    ):
        caches = [first.new_cache(), second.new_cache()]
        exact = [DynamicCache(), DynamicCache()]
        for part in ids.split([130, 10, 10], 1):
            for m, coded, truth in zip((model, other), caches, exact, strict=True):
                torch.testing.assert_close(
                    m(part, past_key_values=coded).logits,
                    m(part, past_key_values=truth).logits,
                    atol=1e-4,
                    rtol=1e-4,
                )


@pytest.mark.parametrize("inner", ["pre", "post"])
def test_two_compressors_on_one_model_serve_their_own_caches(model: Any, inner: str) -> None:
    ids, mask = random_ids(2, 160), torch.ones(2, 160, dtype=torch.long)
    mask[0, :7] = 0
    reads: dict[str, Any] = {"pre": "decode", "post": "attend"}
    compressors = {rope: compressor_for(model, rope) for rope in reads}

    def run(cache: Any) -> tuple[torch.Tensor, list[str]]:
        with recording() as ran, torch.no_grad():
            model(ids[:, :150], attention_mask=mask[:, :150], past_key_values=cache)
            logits = model(ids[:, 150:], attention_mask=mask, past_key_values=cache).logits
        assert cache.coded_layers[0].coded == [128, 128]
        return logits, ran

    alone = {}
    for rope, compressor in compressors.items():
        with attach(model, compressor, read=reads[rope]) as attached:
            alone[rope] = run(attached.new_cache())
    outer = "post" if inner == "pre" else "pre"
    with (
        attach(model, compressors[outer], read=reads[outer]) as one,
        attach(model, compressors[inner], read=reads[inner]) as two,
    ):
        for rope, attached in ((outer, one), (inner, two)):
            logits, ran = run(attached.new_cache())
            assert torch.equal(logits, alone[rope][0])
            assert ran == alone[rope][1]


@pytest.mark.parametrize("read", ["decode", "attend"])
def test_an_attached_model_with_an_ordinary_cache_is_as_before(model: Any, read: Any) -> None:
    ids = random_ids(2, 40)
    with torch.no_grad():
        expected = model(ids, past_key_values=DynamicCache()).logits
        with attach(model, compressor_for(model), read=read):
            assert torch.equal(model(ids, past_key_values=DynamicCache()).logits, expected)


def test_another_model_is_refused(model: Any) -> None:
    with (
        pytest.raises(ArtefactError, match="kv_heads"),
        attach(tiny_model("llama-mqa"), compressor_for(model)),
    ):
        pass


def small(family: str, **settings: Any) -> Any:
    """Of a family that the other tests do not use."""
    common = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    config = AutoConfig.for_model(family, **common, **settings)
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_family_whose_rope_cannot_be_undone_is_refused_by_name() -> None:
    model = small("gptj", n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=256)
    compressor = compressor_for(model, "post")
    with attach(model, compressor):  # post-RoPE codes need no rotary embedding
        pass
    refused = pytest.raises(ModelError, match=r"gptj: .* no rotary cosines and sines")
    with refused, attach(model, compressor_for(model, "pre", quantizer="identity")):
        pass


def test_without_rope_keys_are_the_same_before_and_after_it() -> None:
    model: Any = tiny_model("gpt2")
    ids = random_ids(2, 60)
    exact = model.generate(ids, max_new_tokens=90, do_sample=False)
    compressor = compressor_for(model, "pre", quantizer="identity")
    assert not compressor.pre_rope
    cache = compressor.new_cache(model.config)  # so it needs no attached model either
    assert torch.equal(
        model.generate(ids, past_key_values=cache, max_new_tokens=90, do_sample=False), exact
    )
    assert cache.coded_layers[0].coded == [128, 128] and cache.nbytes()["positions"] == 0


def test_models_whose_layers_cannot_be_tried_alone_are_read_all_the_same() -> None:
    model = tiny_model("llama")
    compressor = compressor_for(model, "post", quantizer="identity")
    offloaded = accelerate.cpu_offload(tiny_model("llama"), execution_device=torch.device("cpu"))
    for name, parameter in model.named_parameters():
        if "norm" in name or "embed" in name:  # as in training in two types
            parameter.data = parameter.data.double()
    for each in (model, offloaded):
        with attach(each, compressor, read="attend"):
            pass


@pytest.mark.parametrize(
    "family, message",
    [
        ("diffllama", "diffllama: DiffLlamaAttention changes what a cache returns before it"),
        ("modernbert-decoder", "modernbert-decoder: the decoder .* is said to be a Linear"),
    ],
)
def test_models_that_codes_do_not_get_through_are_decoded(family: str, message: str) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    model = small(family, **sizes, num_attention_heads=4)
    before, compressor = traces(model), compressor_for(model, "post", quantizer="identity")
    refused = pytest.raises(ModelError, match=f"{message}.*use read='decode'")
    with refused, attach(model, compressor, read="attend"):
        pass
    assert traces(model) == before
    with attach(model, compressor) as attached:
        assert attached.read == "decode"


def test_codes_that_mix_heads_are_refused_for_attend_alone(model: Any) -> None:
    mixed = compressor_for(
        model, "post", quantizer="identity", grouping={"type": "across_heads", "dim": 4}
    )
    with attach(model, mixed):
        pass
    with pytest.raises(KernelError, match="mix heads"), attach(model, mixed, read="attend"):
        pass


def test_attention_that_no_kernel_computes_is_refused_for_attend_alone() -> None:
    model = tiny_model("gemma2")
    before, compressor = traces(model), compressor_for(model, quantizer="identity")
    with attach(model, compressor):
        pass
    refused = pytest.raises(KernelError, match=r"gemma2: layer 1 .*softcap.*read='decode'")
    with refused, attach(model, compressor, read="attend"):
        pass
    assert traces(model) == before


def test_a_variant_that_only_the_call_shows_is_refused(model: Any) -> None:
    cache = compressor_for(model, "post").new_cache(model.config)
    states = CodedStates(cache.coded_layers[0])
    with pytest.raises(KernelError, match=r"Linear attends with softcap.*read='decode'"):
        coded_attention(torch.nn.Linear(1, 1), torch.zeros(1), states, None, softcap=30.0)


def test_masks_that_cannot_be_read_are_refused_for_attend_alone(model: Any) -> None:
    model.set_attn_implementation("flex_attention")
    with attach(model, compressor_for(model, "post", quantizer="identity")) as attached:
        compressor = attached.compressor
    refused = pytest.raises(KernelError, match=r"llama: .*'flex_attention'.*'sdpa'")
    with refused, attach(model, compressor, read="attend"):
        pass


def test_attention_that_cannot_be_exchanged_is_refused_for_attend_alone() -> None:
    config = AutoConfig.for_model("bloom", vocab_size=97, hidden_size=64, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config)
    before, compressor = traces(model), compressor_for(model, "post", quantizer="identity")
    with attach(model, compressor):
        pass
    refused = pytest.raises(ModelError, match=r"bloom: BloomModel .*read='decode'")
    with refused, attach(model, compressor, read="attend"):
        pass
    assert traces(model) == before


def test_what_is_not_coded_goes_to_the_model_s_own_attention(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.set_attn_implementation("eager")
    ids = random_ids(2, 60)
    with torch.no_grad():
        expected = model(ids).logits
        ran: list[Any] = []
        own = modeling_llama.eager_attention_forward

        def eager(module: Any, *args: Any, **kwargs: Any) -> Any:
            ran.append(module.layer_idx)
            return own(module, *args, **kwargs)

        monkeypatch.setattr(modeling_llama, "eager_attention_forward", eager)
        compressor = compressor_for(model, quantizer="identity")
        ran.clear()
        with attach(model, compressor, read="attend") as attached:
            cache = attached.new_cache()
            assert torch.equal(model(ids, past_key_values=cache).logits, expected)
            assert ran == [0, 1]
            model(ids[:, :1], past_key_values=cache)
            assert ran == [0, 1], "codes are read by our kernel"


@pytest.mark.parametrize("form", ["none", "bool", "float", "flash"])
def test_which_slots_a_query_sees_by_any_form_of_mask(form: str) -> None:
    """Two queries at the end of five slots; all but None hide two slots of padding from row 0."""
    causal = torch.ones(5, 5, dtype=torch.bool).tril()[3:].expand(2, 1, 2, 5)
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    seen = causal & real[:, None, None].bool()
    mask, expected = {
        "none": (None, causal),
        "bool": (seen, seen),
        "float": (torch.where(seen, 0.0, torch.finfo(torch.float32).min), seen),
        "flash": (real, seen),
    }[form]
    visible = visible_slots(mask, 2, 5, torch.device("cpu"))
    assert torch.equal(visible.expand(2, 1, 2, 5), expected)


def test_importing_changes_nothing_in_transformers() -> None:
    program = (
        "from transformers import AttentionInterface, AttentionMaskInterface as M\n"
        "from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING as D\n"
        "before = (set(AttentionInterface()), set(M()), dict(D))\n"
        "import vqkv.cache, vqkv.evaluation, vqkv.calibration, vqkv.demo, vqkv.cli\n"
        "assert before == (set(AttentionInterface()), set(M()), dict(D))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


class TestBeforeUse:
    @pytest.mark.parametrize("rope", ["pre", "post"])
    def test_it_is_replacement_by_hand(self, model: Any, rope: str) -> None:
        compressor = compressor_for(model, rope, sinks=3)
        cache = BeforeUseCache(compressor, model.config)
        keys, values = (torch.randn(1, 2, 50, 16) for _ in range(2))
        positions = torch.arange(50, dtype=torch.int32)[None]
        adapter = RotaryAdapter(model, (0, 1))
        if rope == "pre":
            cache.rows.note(0, positions, [])
            cache.rows.rotary = adapter
        read_keys, read_values = cache.update(keys, values, 1)
        tables = adapter.tables(1, positions)
        plain = adapter.unrotate(1, keys, tables) if rope == "pre" else keys
        expected = compressor.decode(1, "keys", compressor.encode(1, "keys", plain))
        if rope == "pre":
            expected = adapter.rotate(1, expected, tables)
        assert torch.equal(read_keys[:, :, 3:], expected[:, :, 3:])
        assert torch.equal(read_keys[:, :, :3], keys[:, :, :3])
        decoded = compressor.decode(1, "values", compressor.encode(1, "values", values))
        assert torch.equal(read_values[:, :, 3:], decoded[:, :, 3:])

    def test_one_forward_each(self, model: Any) -> None:
        cache = BeforeUseCache(compressor_for(model, "post"), model.config)
        with torch.no_grad():
            model(random_ids(1, 20), past_key_values=cache)
            with pytest.raises(CacheError, match="one forward per cache"):
                model(random_ids(1, 1), past_key_values=cache)

    def test_padding_is_refused(self, model: Any) -> None:
        ids = random_ids(1, 20)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        compressor = compressor_for(model, "post")
        with attach(model, compressor), pytest.raises(CacheError, match="without padding"):
            model(
                ids, attention_mask=mask, past_key_values=BeforeUseCache(compressor, model.config)
            )

    def test_pre_rope_needs_an_attached_model(self, model: Any) -> None:
        with pytest.raises(CacheError, match=r"vqkv\.attach"):
            model(
                random_ids(1, 9),
                past_key_values=BeforeUseCache(compressor_for(model), model.config),
            )
