from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PreTrainedModel,
)

from tests.tiny_models import ROPE_FAMILIES, tiny_model
from vqkv.attention import attention_modules
from vqkv.calibration import Kind, StateCapture
from vqkv.errors import ModelError
from vqkv.geometry import Geometry

T = 24
IDS = torch.randint(2, 97, (T,), generator=torch.Generator().manual_seed(1))
KINDS: tuple[Kind, ...] = ("keys", "pre_keys", "values", "queries", "pre_queries")
KEYS: tuple[Kind, ...] = ("keys",)
PRE_KEYS: tuple[Kind, ...] = ("pre_keys",)
CAPTURED = [name for name in ROPE_FAMILIES if name != "mistral"]  # all its layers slide


def captured(
    model: PreTrainedModel, kinds: tuple[Kind, ...] = KINDS
) -> dict[tuple[int, Kind], torch.Tensor]:
    layers = Geometry.from_model(model).compressed
    found: dict[tuple[int, Kind], torch.Tensor] = {}

    def take(layer: int, kind: Kind, states: torch.Tensor) -> None:
        found[layer, kind] = states.clone()

    with StateCapture(model, dict.fromkeys(layers, kinds), take) as capture:
        capture.run(IDS)
    assert set(found) == {(layer, kind) for layer in layers for kind in kinds}
    return found


def interfaces() -> tuple[set[str], set[str]]:
    return set(AttentionInterface()), set(AttentionMaskInterface())


@torch.no_grad()
def cache_of(model: PreTrainedModel) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(input_ids=IDS[None], past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize("family", [*CAPTURED, "gpt2"])
def test_keys_and_values_are_those_that_a_cache_gets(family: str) -> None:
    model = tiny_model(family)
    cache = cache_of(model)
    for (layer, kind), states in captured(model, ("keys", "values")).items():
        torch.testing.assert_close(states, getattr(cache.layers[layer], kind), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "llama-mqa", "llama-yarn", "glm", "stablelm"])
def test_pre_rope_states_are_those_of_the_projections(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype)
    projected: dict[tuple[int, str], torch.Tensor] = {}
    handles = []
    for layer, module in attention_modules(model).items():
        for kind, name in (("pre_keys", "k_proj"), ("pre_queries", "q_proj")):

            def keep(
                _: nn.Module, args: Any, output: torch.Tensor, at: tuple[int, str] = (layer, kind)
            ) -> None:
                projected[at] = output.unflatten(-1, (-1, 16)).transpose(1, 2)

            projection: Any = getattr(module, name)
            handles.append(projection.register_forward_hook(keep))
    found = captured(model)
    for handle in handles:
        handle.remove()
    bound = 1e-5 if dtype == torch.float32 else 0.01
    for at, expected in projected.items():
        states = found[at[0], at[1]]  # type: ignore[index]
        assert states.dtype == dtype
        error = (states - expected).float().norm() / expected.float().norm()
        assert error < bound


def test_pre_rope_keys_of_a_qk_norm_model_are_normed_ones() -> None:
    model = tiny_model("qwen3")
    normed: dict[int, torch.Tensor] = {}
    for layer, module in attention_modules(model).items():

        def keep(_: nn.Module, args: Any, output: torch.Tensor, layer: int = layer) -> None:
            normed[layer] = output.transpose(1, 2)

        norm: Any = module.k_norm
        norm.register_forward_hook(keep)
    found = captured(model, ("pre_keys",))
    for layer, expected in normed.items():
        torch.testing.assert_close(found[layer, "pre_keys"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_oss"])
def test_queries_and_keys_give_the_attention_that_the_model_computes(family: str) -> None:
    model = tiny_model(family, attn_implementation="eager")
    states = captured(model, ("keys", "queries"))
    with torch.no_grad():
        output: Any = model(input_ids=IDS[None], output_attentions=True)
    causal = torch.ones(T, T).tril().bool()
    for layer in {layer for layer, _ in states}:
        keys, queries = states[layer, "keys"], states[layer, "queries"]
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
        scores = (queries @ keys.transpose(2, 3) / 16**0.5).masked_fill(~causal, -torch.inf)
        expected = output.attentions[layer]
        # gpt-oss has sinks in its softmax, so rows are compared up to their sum.
        expected = expected / expected.sum(-1, keepdim=True)
        torch.testing.assert_close(scores.softmax(-1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_model_computes_what_it_does_without_capture(implementation: str) -> None:
    # Sliding layers need their masks, which transformers makes by the attention's name.
    model = tiny_model("gemma3", attn_implementation=implementation)
    base: Any = model.get_decoder()
    outputs = []
    base.register_forward_hook(lambda *args: outputs.append(args[-1].last_hidden_state))
    captured(model)
    with torch.no_grad():
        base(input_ids=IDS[None], use_cache=False)
    assert torch.equal(outputs[0], outputs[1])


def test_logits_are_not_computed() -> None:
    model: Any = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    captured(model)


def test_only_wanted_layers_are_handed_out() -> None:
    found: list[tuple[int, Kind]] = []
    model = tiny_model("llama")
    wants: dict[int, tuple[Kind, ...]] = {0: ("pre_keys",), 1: ("values", "keys")}
    with StateCapture(model, wants, lambda i, kind, _: found.append((i, kind))) as capture:
        capture.run(IDS)
    assert found == [(0, "pre_keys"), (1, "values"), (1, "keys")]


class Interrupted(Exception):
    pass


def test_everything_is_undone_after_an_exception() -> None:
    model = tiny_model("llama")
    model.train()
    before = interfaces()
    hooks = hook_count(model)

    def fail(*_: Any) -> None:
        raise Interrupted

    with (
        pytest.raises(Interrupted),
        StateCapture(model, {1: PRE_KEYS}, fail) as capture,
    ):
        assert interfaces() != before
        assert not model.training
        capture.run(IDS)
    assert interfaces() == before
    assert hook_count(model) == hooks
    assert model.config._attn_implementation == "sdpa"
    assert model.training


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_two_models_at_once() -> None:
    first, second = tiny_model("llama"), tiny_model("qwen2")
    found: dict[str, list[torch.Tensor]] = {"first": [], "second": []}
    with (
        StateCapture(first, {0: KEYS}, lambda *a: found["first"].append(a[2])) as one,
        StateCapture(second, {0: KEYS}, lambda *a: found["second"].append(a[2])) as two,
    ):
        two.run(IDS)
        one.run(IDS)
    assert torch.equal(found["first"][0], captured(first)[0, "keys"])
    assert torch.equal(found["second"][0], captured(second)[0, "keys"])


def test_pre_rope_states_of_a_model_without_rope() -> None:
    with pytest.raises(ModelError, match=r"gpt2: .*use a scheme of post-RoPE keys"):
        StateCapture(tiny_model("gpt2"), {0: PRE_KEYS}, lambda *_: None)


def test_attention_outside_of_the_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    before = interfaces()
    monkeypatch.setattr(type(model.get_decoder()), "set_attn_implementation", lambda *_: None)
    with (
        pytest.raises(ModelError, match="does not let its attention be exchanged"),
        StateCapture(model, {0: KEYS}, lambda *_: None),
    ):
        pass
    assert interfaces() == before


def test_a_layer_that_never_runs() -> None:
    with (
        pytest.raises(ModelError, match=r"the attention of layers \[7\] does not go through"),
        StateCapture(tiny_model("llama"), {7: KEYS}, lambda *_: None) as capture,
    ):
        capture.run(IDS)
