from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from tests.tiny_models import ROPE_FAMILIES, tiny_model
from vqkv.attention import attention_modules
from vqkv.cache.rope import ForwardCapture, RotaryAdapter
from vqkv.errors import CacheError, ModelError

T = 12
#: Two rows, the first with three padding tokens at its left.
IDS = torch.randint(2, 97, (2, T), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[0, :3] = 0


def adapter_for(model: PreTrainedModel) -> RotaryAdapter:
    return RotaryAdapter(model, attention_modules(model))


@contextmanager
def watching(model: PreTrainedModel, capture: ForwardCapture) -> Iterator[list[dict[str, Any]]]:
    """What the capture shows while each attention module runs."""
    seen: list[dict[str, Any]] = []

    def note(layer: int) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            seen.append(
                {
                    "layer": layer,
                    "tables": capture.tables(layer),
                    "positions": capture.positions,
                    "padding": capture.left_padding,
                }
            )

        return hook

    handles = [
        module.register_forward_pre_hook(note(layer))
        for layer, module in attention_modules(model).items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def projected_keys(model: PreTrainedModel) -> Iterator[dict[int, torch.Tensor]]:
    """Outputs of the last module that touches keys before RoPE, as `[B, H, T, D]`."""
    keys: dict[int, torch.Tensor] = {}
    handles = []
    for layer, module in attention_modules(model).items():
        children = dict(module.named_children())
        source = children.get("k_norm", children.get("k_layernorm", children.get("k_proj")))
        assert source is not None

        def hook(_: nn.Module, __: Any, output: torch.Tensor, layer: int = layer) -> None:
            if output.ndim == 3:
                output = output.unflatten(-1, (-1, 16)).transpose(1, 2)
            elif output.shape[1] == T:
                output = output.transpose(1, 2)
            keys[layer] = output.detach()

        handles.append(source.register_forward_hook(hook))
    try:
        yield keys
    finally:
        for handle in handles:
            handle.remove()


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("family", ROPE_FAMILIES)
def test_unrotating_undoes_rotating(family: str) -> None:
    model = tiny_model(family)
    adapter = adapter_for(model)
    keys = torch.randn(2, 2, T, 16, generator=torch.Generator().manual_seed(2))
    positions = torch.stack([torch.arange(T), torch.arange(100, 100 + T)])
    for layer in adapter.modules:
        tables = adapter.tables(layer, positions)
        rotated = adapter.rotate(layer, keys, tables)
        torch.testing.assert_close(
            adapter.unrotate(layer, rotated, tables), keys, atol=2e-6, rtol=0
        )
        turns = (rotated - keys).abs().max() > 0.1
        assert turns == (layer not in adapter.still)


@pytest.mark.parametrize(
    "family", [name for name in ROPE_FAMILIES if name not in ("phi3", "gpt_neox")]
)
def test_unrotated_cache_holds_what_was_projected(family: str) -> None:
    model = tiny_model(family)
    adapter = adapter_for(model)
    cache = DynamicCache(config=model.config)
    capture = ForwardCapture(model, adapter)
    watched, watching_projections = watching(model, capture), projected_keys(model)
    with torch.no_grad(), capture, watched as seen, watching_projections as projected:
        model(IDS, attention_mask=MASK, past_key_values=cache)
    assert len(seen) == len(cache.layers)
    for shown in seen:
        layer = shown["layer"]
        keys = cache.layers[layer].keys
        before = adapter.unrotate(layer, keys, shown["tables"])
        torch.testing.assert_close(before, projected[layer], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ROPE_FAMILIES)
def test_tables_are_recomputed_as_the_model_had_them(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype)
    adapter = adapter_for(model)
    capture = ForwardCapture(model, adapter)
    positions = (MASK.cumsum(-1) - 1).clamp(min=0) + 50
    with torch.no_grad(), capture, watching(model, capture) as seen:
        model(IDS, attention_mask=MASK, position_ids=positions)
    assert {shown["layer"] for shown in seen} == set(adapter.modules)
    for shown in seen:
        assert shown["positions"].dtype == torch.int32
        assert torch.equal(shown["positions"], positions.int())
        recomputed = adapter.tables(shown["layer"], shown["positions"])
        for mine, theirs in zip(recomputed, shown["tables"], strict=True):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)


def test_layers_of_gemma3_have_their_own_frequencies() -> None:
    adapter = adapter_for(tiny_model("gemma3"))
    positions = torch.arange(T)[None]
    sliding, full = adapter.tables(0, positions), adapter.tables(1, positions)
    assert not torch.allclose(sliding[0], full[0], atol=1e-2)
    assert torch.equal(sliding[0], adapter.tables(2, positions)[0])


def test_bf16_keys_survive_as_well_as_bf16_allows() -> None:
    """Coarse tables undo the coarse rotation that the model did; finer ones do not."""
    model = tiny_model("llama", torch.bfloat16)
    adapter = adapter_for(model)
    positions = torch.arange(200, 200 + T)[None]
    keys = torch.randn(1, 2, T, 16, generator=torch.Generator().manual_seed(3))
    tables = adapter.tables(0, positions)
    cached = adapter.rotate(0, keys, tables)
    torch.testing.assert_close(adapter.unrotate(0, cached, tables), keys, atol=2e-6, rtol=0)
    fine = adapter_for(tiny_model("llama")).tables(0, positions)
    assert (adapter.unrotate(0, cached, fine) - keys).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("family", "pairs"),
    [
        ("llama", [(i, i + 8) for i in range(8)]),
        ("gpt_oss", [(i, i + 8) for i in range(8)]),
        ("cohere", [(2 * i, 2 * i + 1) for i in range(8)]),
        ("glm", [(2 * i, 2 * i + 1) for i in range(4)]),
        ("stablelm", [(0, 2), (1, 3)]),
        ("gpt_neox", [(0, 2), (1, 3)]),
    ],
)
def test_channel_pairs(family: str, pairs: list[tuple[int, int]]) -> None:
    adapter = adapter_for(tiny_model(family))
    assert list(adapter.pairs(1)) == pairs


def test_layers_without_rope_pass_keys_through() -> None:
    adapter = adapter_for(tiny_model("smollm3"))
    assert adapter.still == {1}
    assert adapter.pairs(1) == ()
    keys = torch.randn(1, 2, T, 16)
    tables = adapter.tables(1, torch.arange(T)[None])
    assert torch.equal(adapter.rotate(1, keys, tables), keys)
    assert torch.equal(adapter.unrotate(1, keys, tables), keys)


def test_generate_counts_positions_from_the_first_real_token() -> None:
    model = tiny_model("llama")
    capture = ForwardCapture(model, adapter_for(model))
    with capture, watching(model, capture) as seen:
        generate: Any = model.generate
        generate(IDS, attention_mask=MASK, max_new_tokens=3, do_sample=False)
    prefill, *steps = [shown for shown in seen if shown["layer"] == 1]
    assert prefill["positions"][0, 3:].tolist() == list(range(T - 3))
    assert prefill["positions"][1].tolist() == list(range(T))
    assert [step["positions"].tolist() for step in steps] == [
        [[T - 3], [T]],
        [[T - 2], [T + 1]],
    ]
    assert all(shown["padding"].tolist() == [3, 0] for shown in seen)


def test_a_bare_forward_counts_positions_from_the_first_slot() -> None:
    model = tiny_model("llama")
    capture = ForwardCapture(model, adapter_for(model))
    with torch.no_grad(), capture, watching(model, capture) as seen:
        model(IDS, attention_mask=MASK)
        model(IDS)
    assert all(shown["positions"].tolist() == [list(range(T))] * 2 for shown in seen)
    assert [shown["padding"] is None for shown in seen] == [False, False, True, True]


def test_the_mask_is_seen_when_the_decoder_is_called_by_itself() -> None:
    model = tiny_model("llama")
    capture = ForwardCapture(model, adapter_for(model))
    with torch.no_grad(), capture, watching(model, capture) as seen:
        model.get_decoder()(IDS, attention_mask=MASK)
    assert seen[0]["padding"].tolist() == [3, 0]


def test_the_mask_that_counts_is_the_users() -> None:
    """Multimodal models hand their decoder a mask of their own."""
    model = tiny_model("llama")
    derived = torch.ones(2, 1, T, T, dtype=torch.bool).tril()
    model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"attention_mask": derived}), with_kwargs=True
    )
    capture = ForwardCapture(model, adapter_for(model))
    with torch.no_grad(), capture, watching(model, capture) as seen:
        model(IDS, attention_mask=MASK)
    assert seen[0]["padding"].tolist() == [3, 0]


def test_padding_of_models_without_rope() -> None:
    model = tiny_model("gpt2")
    capture = ForwardCapture(model)
    seen: list[Any] = []
    first = attention_modules(model)[0]
    handle = first.register_forward_pre_hook(lambda *_: seen.append(capture.left_padding))
    with torch.no_grad(), capture:
        model(IDS, attention_mask=MASK)
    handle.remove()
    assert seen[0].tolist() == [3, 0]


def test_a_mask_that_hides_padding_is_refused() -> None:
    model = tiny_model("llama")
    capture = ForwardCapture(model, adapter_for(model))
    mask = torch.ones(2, 1, T, T, dtype=torch.bool).tril()
    refused = pytest.raises(CacheError, match=r"\[2, 1, 12, 12\].*\[batch, tokens\]")
    with torch.no_grad(), capture, watching(model, capture), refused:
        model(IDS, attention_mask=mask)


def test_two_models_do_not_mix() -> None:
    first, second = tiny_model("llama"), tiny_model("gemma3")
    one, two = (ForwardCapture(m, adapter_for(m)) for m in (first, second))
    with torch.no_grad(), one, two, watching(first, one) as a, watching(second, two) as b:
        first(IDS, position_ids=torch.arange(T)[None] + 7)
        second(IDS)
        with pytest.raises(CacheError):
            _ = one.positions
    assert len(a) == 2
    assert len(b) == 3
    assert a[0]["positions"][0, 0] == 7
    assert b[0]["positions"][0, 0] == 0


def test_nothing_is_shown_outside_a_forward() -> None:
    model = tiny_model("llama")
    capture = ForwardCapture(model, adapter_for(model))
    with torch.no_grad(), capture:
        model(IDS)
        for show in (lambda: capture.positions, lambda: capture.left_padding):
            with pytest.raises(CacheError, match=r"llama.*inside the context"):
                show()
        with pytest.raises(CacheError, match="layer 1"):
            capture.tables(1)
        with pytest.raises(CacheError, match="already entered"), capture:
            pass


def test_hooks_leave_with_the_context_and_with_exceptions() -> None:
    model = tiny_model("llama")
    before = hook_count(model)
    capture = ForwardCapture(model, adapter_for(model))
    with pytest.raises(KeyError), capture:
        assert hook_count(model) > before
        raise KeyError
    assert hook_count(model) == before


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_a_forward_that_breaks_off_leaves_nothing_for_the_next(error: type[BaseException]) -> None:
    model = tiny_model("llama")
    capture = ForwardCapture(model, adapter_for(model))

    def fail(module: nn.Module, args: Any) -> None:
        raise error

    failing = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with torch.no_grad(), capture:
        with pytest.raises(error):
            model(IDS, attention_mask=MASK)
        failing.remove()
        with watching(model, capture) as seen:
            model(IDS)
        assert [shown["padding"] for shown in seen] == [None, None]
        with pytest.raises(CacheError):
            _ = capture.positions


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_frequencies_that_change_with_length_are_refused(rope_type: str) -> None:
    parameters: dict[str, Any] = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0}
    if rope_type == "longrope":
        parameters |= {
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 64,
        }
    model = tiny_model("llama", rope_parameters=parameters)
    with pytest.raises(ModelError, match=f"llama.*{rope_type}.*post-RoPE"):
        adapter_for(model)


def test_families_without_tables_are_refused() -> None:
    with pytest.raises(ModelError, match=r"gpt2.*post-RoPE"):
        adapter_for(tiny_model("gpt2"))


def test_llama4_is_refused() -> None:
    config = AutoConfig.for_model(
        "llama4_text",
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        intermediate_size_mlp=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match="Llama4TextAttention has no apply_rotary_pos_emb"):
        adapter_for(model)


def test_keys_changed_after_rotation_are_refused() -> None:
    """HunYuan norms keys after it rotates them."""
    config = AutoConfig.for_model(
        "hunyuan_v1_dense",
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.model.layers[0].self_attn.key_layernorm.weight.copy_(torch.linspace(0.9, 1.1, 16))
    with pytest.raises(ModelError, match="layer 0 do not un-rotate"):
        adapter_for(model)


def test_tables_from_another_module_are_refused() -> None:
    model = tiny_model("llama")
    capture = ForwardCapture(model, adapter_for(model))
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    with torch.no_grad(), capture, pytest.raises(ModelError, match="did not run before layer 0"):
        model(IDS)


def test_tables_that_cannot_be_recomputed_are_refused() -> None:
    model = tiny_model("llama")
    adapter = adapter_for(model)

    def halve(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        cos, sin = kwargs["position_embeddings"]
        return args, kwargs | {"position_embeddings": (cos / 2, sin / 2)}

    adapter.modules[1].register_forward_pre_hook(halve, with_kwargs=True)
    refused = pytest.raises(ModelError, match="layer 1 is handed other rotary tables")
    with torch.no_grad(), ForwardCapture(model, adapter), refused:
        model(IDS)
