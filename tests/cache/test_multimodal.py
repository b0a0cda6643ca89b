"""Models that see: positions of images count along several axes, those of text along one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, DynamicCache

from tests.cache.compressors import compressor_for, random_ids
from tests.cache.test_fused import byte_compressor
from tests.cache.test_steps import served
from tests.tiny_models import IMAGE_START, IMAGE_TOKEN, MULTIMODAL_FAMILIES, tiny_config, tiny_model
from vqkv.attention import attention_modules, position_axes
from vqkv.cache import VQCache, attach
from vqkv.cache.rows import Rows
from vqkv.errors import ModelError
from vqkv.kernels import recording, using

#: Long enough that several pages are coded.
NEW = 90


def seeing(family: str) -> Any:
    """With eyes, also where the family has a model of text alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(tiny_config(family)).eval()
    model.generation_config.pad_token_id = 0
    return model


def prompt() -> dict[str, Any]:
    """Two rows with an image of 4 × 4 patches in each, the first row padded."""
    ids = random_ids(2, 60) % 87 + 3
    ids[:, 10] = IMAGE_START
    ids[:, 11:15] = IMAGE_TOKEN
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == IMAGE_TOKEN).int(),
        "pixel_values": torch.randn(32, 12, generator=torch.Generator().manual_seed(0)),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }


def generate(model: Any, cache: Any, **given: Any) -> torch.Tensor:
    result: torch.Tensor = model.generate(
        past_key_values=cache, max_new_tokens=NEW, do_sample=False, **given
    )
    return result


@pytest.mark.parametrize("read", ["decode", "attend"])
@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize("family", MULTIMODAL_FAMILIES)
def test_images_are_cached_as_by_the_exact_cache(family: str, rope: str, read: Any) -> None:
    model = seeing(family)
    exact = generate(model, DynamicCache(config=model.config.get_text_config()), **prompt())
    compressor = compressor_for(model, rope, quantizer="identity")
    with attach(model, compressor, read=read) as attached:
        cache = attached.new_cache()
        assert torch.equal(generate(model, cache, **prompt()), exact)
    assert all(min(layer.coded) >= 64 for layer in cache.coded_layers.values())
    if rope == "pre":
        assert cache.rows.positions is not None
        columns, rows = cache.rows.positions[1, 11:15].T[[2, 1]]
        assert (columns - columns[0]).tolist() == [0, 1, 0, 1]
        assert (rows - rows[0]).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("family", MULTIMODAL_FAMILIES)
def test_text_has_one_position_a_token_and_is_read_by_a_fused_kernel(family: str) -> None:
    model = tiny_model(family)
    compressor = byte_compressor(model, "pre")
    with attach(model, compressor) as attached, using(attend_codes="naive"), recording() as ran:
        cache = attached.new_cache()
        generate(model, cache, input_ids=random_ids(2, 60))
    assert "attend_codes.naive" in ran
    assert cache.rows.positions is not None
    assert cache.rows.positions.shape == (2, 60 + NEW - 1)


def with_an_image_in_the_first_row_alone() -> dict[str, Any]:
    """Rows without padding."""
    given = prompt()
    given["attention_mask"] = torch.ones_like(given["attention_mask"])
    given["input_ids"][1] = random_ids(60) % 87 + 3
    given["mm_token_type_ids"][1] = 0
    for name in ("pixel_values", "image_grid_thw"):
        given[name] = given[name][: len(given[name]) // 2]
    return given


@pytest.mark.parametrize("given", [prompt(), with_an_image_in_the_first_row_alone()])
def test_images_are_decoded_to_be_read(given: dict[str, Any]) -> None:
    model = seeing("qwen3_vl")
    compressor, found = byte_compressor(model, "pre"), []
    for read in ("decode", "attend"):
        asked = using(attend_codes="naive")
        with attach(model, compressor, read=read) as attached, asked, recording() as ran:
            found.append(generate(model, attached.new_cache(), **given))
        assert not any(name.startswith("attend_codes") for name in ran)
    assert torch.equal(*found)


def test_rows_that_have_lost_their_images_are_read_by_a_fused_kernel() -> None:
    model = seeing("qwen3_vl")
    given = with_an_image_in_the_first_row_alone()
    token = torch.full((1, 1), 5)
    with attach(model, byte_compressor(model, "pre"), read="attend") as attached, torch.no_grad():
        cache = attached.new_cache()
        generate(model, cache, **given)
        cache.batch_select_indices(torch.tensor([1]))
        assert cache.rows.positions is not None and cache.rows.positions.ndim == 3
        length = cache.get_seq_length()
        again = copy.deepcopy(cache)
        positions = torch.full((3, 1, 1), length)
        with using(attend_codes="naive"), recording() as ran:
            fused = model(token, position_ids=positions, past_key_values=cache).logits
        assert "attend_codes.naive" in ran
        decoded = model(token, position_ids=positions, past_key_values=again).logits
    torch.testing.assert_close(fused, decoded, atol=1e-2, rtol=1e-2)


def test_keys_are_coded_before_rope() -> None:
    """The model's own, also those of an image."""
    model = seeing("qwen3_vl")
    before: list[torch.Tensor] = []
    norm: Any = attention_modules(model)[0].k_norm
    with attach(model, compressor_for(model, quantizer="identity")) as attached:
        hook = norm.register_forward_hook(lambda *given: before.append(given[2].transpose(1, 2)))
        cache = attached.new_cache()
        generate(model, cache, **prompt())
        layer = cache.coded_layers[0]
        coded = layer._decoded("keys", torch.arange(2), 0, 64)
    hook.remove()
    keys = torch.cat(before, 2)
    for row, pad in enumerate((5, 0)):
        expected = keys[row, :, pad + layer.sinks : pad + 64].transpose(0, 1)
        found = coded[64 * row :][layer.sinks : 64]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_cache_with_images_is_saved_cropped_and_reordered(tmp_path: Path) -> None:
    model = seeing("qwen3_vl")
    compressor = compressor_for(model, quantizer="identity")
    with attach(model, compressor) as attached:
        cache = attached.new_cache()
        generate(model, cache, **prompt())
        cache.save(tmp_path / "kept")
        loaded = VQCache.load(tmp_path / "kept", compressor, model.config)
        for each in (cache, loaded):
            each.crop(-49)
            each.batch_select_indices(torch.tensor([1, 0]))
        positions = torch.tensor([[80], [75]])
        ids = torch.full((2, 1), 5)
        found = [
            model(ids, position_ids=positions[None].expand(3, -1, -1), past_key_values=each).logits
            for each in (cache, loaded)
        ]
    assert torch.equal(*found)
    assert cache.rows.positions is not None and cache.rows.positions.shape == (2, 101, 3)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("told", [True, False])
def test_steps_after_an_image_give_what_forwards_give(family: str, told: bool) -> None:
    """Of keys after RoPE; without positions a model would count on from where its image ended."""
    model = seeing(family)
    given = {name: value[-len(value) // 2 :] for name, value in prompt().items()}
    more = random_ids(1, 140) % 87 + 3
    given["input_ids"] = torch.cat([given["input_ids"], more], 1)
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    given["mm_token_type_ids"] = (given["input_ids"] == IMAGE_TOKEN).int()
    ids, found = random_ids(1, 20, seed=3) % 87 + 3, []
    for fixed in (False, True):
        logits = []
        with served(model, byte_compressor(model, "post"), fixed) as (cache, steps):
            model(**given, past_key_values=cache)
            ahead = 200 + int(model.model.rope_deltas)
            for place in range(20):
                positions = torch.full((3, 1, 1), ahead + place) if told else None
                logits.append(
                    model(
                        ids[:, place : place + 1], position_ids=positions, past_key_values=cache
                    ).logits
                )
        found.append(torch.cat(logits))
        if steps is not None:
            assert (steps.taken > 15) if told else (steps.taken == 0)
    torch.testing.assert_close(*found, atol=2e-5, rtol=2e-5)


def test_positions_that_are_no_whole_numbers_are_refused() -> None:
    model = seeing("qwen3_vl")
    ids, positions = random_ids(1, 20), torch.arange(20.0).expand(3, 1, -1)
    with attach(model, compressor_for(model, quantizer="identity")) as attached, torch.no_grad():
        model(ids, position_ids=positions, past_key_values=attached.new_cache())
        with pytest.raises(ModelError, match="positions are no whole numbers"):
            model(ids, position_ids=positions + 0.5, past_key_values=attached.new_cache())


def test_axes_by_kind_of_layer() -> None:
    rotary = torch.nn.Module()
    rotary.mrope_section = {"sliding_attention": None, "full_attention": [4, 2, 2]}  # type: ignore[assignment]
    config = tiny_config("gemma3")
    assert [position_axes(rotary, config, layer) for layer in range(3)] == [0, 3, 0]


def test_an_image_after_text() -> None:
    rows, text, image = Rows(), torch.arange(4)[None], torch.full((1, 2, 3), 4)
    rows.note(0, text, None)
    rows.note(4, image, None)
    rows.note(6, text + 5, None)
    assert rows.positions is not None
    expected = torch.tensor([[0, 1, 2, 3, 4, 4, 5, 6, 7, 8]])[..., None].expand(-1, -1, 3)
    assert torch.equal(rows.positions, expected)
