"""Models that see: positions of images count along several axes, those of text along one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, DynamicCache

from tests.cache.compressors import compressor_for, random_ids
from tests.cache.test_fused import byte_compressor
from tests.tiny_models import IMAGE_START, IMAGE_TOKEN, MULTIMODAL_FAMILIES, tiny_config, tiny_model
from vqkv.cache import attach
from vqkv.cache.rows import Rows
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


def test_images_are_decoded_to_be_read() -> None:
    model = seeing("qwen3_vl")
    compressor, found = byte_compressor(model, "pre"), []
    for read in ("decode", "attend"):
        with attach(model, compressor, read=read) as attached, recording() as ran:
            found.append(generate(model, attached.new_cache(), **prompt()))
        assert not any(name.startswith("attend_codes") for name in ran)
    assert torch.equal(*found)


def test_an_image_after_text() -> None:
    rows, text, image = Rows(), torch.arange(4)[None], torch.full((1, 2, 3), 4)
    rows.note(0, text, None)
    rows.note(4, image, None)
    rows.note(6, text + 5, None)
    assert rows.positions is not None
    expected = torch.tensor([[0, 1, 2, 3, 4, 4, 5, 6, 7, 8]])[..., None].expand(-1, -1, 3)
    assert torch.equal(rows.positions, expected)
