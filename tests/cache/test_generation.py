"""Every way to generate, against the exact cache."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache, PreTrainedModel

from tests.cache.compressors import compressor_for, random_ids
from tests.tiny_models import tiny_model
from vqkv.cache import VQCache, attach
from vqkv.errors import ArtefactError, CacheError, ModelError
from vqkv.kernels import recording
from vqkv.layouts import PAGE_TOKENS

#: Long enough that several pages are coded.
NEW = 90
PROMPT = random_ids(2, 60)

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7},
    "beams": {"do_sample": False, "num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 3},
}


def generate(model: Any, cache: Any, ids: torch.Tensor = PROMPT, **way: Any) -> Any:
    torch.manual_seed(0)
    options = {"max_new_tokens": NEW, "pad_token_id": 0, "do_sample": False, **way}
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **options)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", max_position_embeddings=1024)


@pytest.mark.parametrize("read", ["decode", "attend"])
@pytest.mark.parametrize("way", WAYS)
def test_identity_generates_what_the_exact_cache_does(model: Any, way: str, read: Any) -> None:
    exact = generate(model, DynamicCache(config=model.config), **WAYS[way])
    compressor = compressor_for(model, "pre", quantizer="identity")
    with attach(model, compressor, read=read) as attached:
        cache = attached.new_cache()
        assert torch.equal(generate(model, cache, **WAYS[way]), exact)
    assert cache.coded_layers[0].coded[0] >= 64, "nothing was coded"


@pytest.mark.parametrize("way", WAYS)
def test_post_rope_identity_needs_no_attached_model(model: Any, way: str) -> None:
    exact = generate(model, DynamicCache(config=model.config), **WAYS[way])
    compressor = compressor_for(model, "post", quantizer="identity")
    cache = compressor.new_cache(model.config)
    assert torch.equal(generate(model, cache, **WAYS[way]), exact)


@pytest.mark.parametrize("read", ["decode", "attend"])
def test_prompt_lookup_decoding(model: Any, read: Any) -> None:
    prompt = random_ids(1, 20).repeat(1, 4)
    way = {"prompt_lookup_num_tokens": 4}
    exact = generate(model, DynamicCache(config=model.config), prompt, **way)
    with attach(model, compressor_for(model, quantizer="identity"), read=read) as attached:
        assert torch.equal(generate(model, attached.new_cache(), prompt, **way), exact)


def test_prompt_lookup_with_real_codes_is_greedy_decoding(model: Any) -> None:
    prompt = random_ids(1, 20).repeat(1, 4)
    with attach(model, compressor_for(model)) as attached:
        greedy = generate(model, attached.new_cache(), prompt)
        looked_up = generate(model, attached.new_cache(), prompt, prompt_lookup_num_tokens=4)
    # Speculation codes pages a few tokens later, so texts may part after some of them.
    assert torch.equal(greedy[:, :100], looked_up[:, :100])


def test_assisted_decoding(model: Any) -> None:
    assistant = tiny_model("llama", max_position_embeddings=1024, num_hidden_layers=1)
    prompt = PROMPT[:1]
    exact = generate(model, DynamicCache(config=model.config), prompt)
    with attach(model, compressor_for(model, quantizer="identity")) as attached:
        cache = attached.new_cache()
        assert torch.equal(generate(model, cache, prompt, assistant_model=assistant), exact)


@pytest.mark.parametrize("read", ["decode", "attend"])
def test_left_padding(model: Any, read: Any) -> None:
    ids, mask = PROMPT.clone(), torch.ones_like(PROMPT)
    ids[0, :23], mask[0, :23] = 0, 0
    exact = generate(model, DynamicCache(config=model.config), ids, attention_mask=mask)
    with attach(model, compressor_for(model, quantizer="identity"), read=read) as attached:
        coded = generate(model, attached.new_cache(), ids, attention_mask=mask)
    assert torch.equal(coded, exact)


def test_chunked_prefill(model: Any) -> None:
    compressor = compressor_for(model, quantizer="identity")
    exact = generate(model, DynamicCache(config=model.config))
    with attach(model, compressor) as attached:
        cache = attached.new_cache()
        coded = generate(model, cache, prefill_chunk_size=16)
    assert torch.equal(coded, exact)


def test_chunked_prefill_with_more_padding_than_a_chunk(model: Any) -> None:
    ids, mask = PROMPT.clone(), torch.ones_like(PROMPT)
    ids[0, :23], mask[0, :23] = 0, 0
    way = {"attention_mask": mask, "prefill_chunk_size": 16}
    exact = generate(model, DynamicCache(config=model.config), ids, **way)
    with attach(model, compressor_for(model, quantizer="identity")) as attached:
        assert torch.equal(generate(model, attached.new_cache(), ids, **way), exact)


def by_hand(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    """What greedy `generate` does: all that the cache lacks in one forward, then token by token."""
    with torch.no_grad():
        for _ in range(NEW):
            logits = model(ids[:, cache.get_seq_length() :], past_key_values=cache).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("read", ["decode", "attend"])
@pytest.mark.parametrize("quantizer", ["identity", "product"])
def test_several_turns_on_one_cache(model: Any, quantizer: str, read: Any) -> None:
    compressor = compressor_for(model, quantizer=quantizer)
    with attach(model, compressor, read=read) as attached:
        cache, fresh = attached.new_cache(), attached.new_cache()
        first = generate(model, cache)
        assert torch.equal(first, by_hand(model, fresh, PROMPT))
        follow_up = torch.cat([first, random_ids(2, 30, seed=4)], 1)
        second = generate(model, cache, follow_up)
        assert torch.equal(second, by_hand(model, fresh, follow_up))
    assert cache.get_seq_length() == second.shape[1] - 1
    if quantizer == "identity":
        assert torch.equal(second, generate(model, DynamicCache(config=model.config), follow_up))


def test_a_copied_prefix_serves_several_continuations(model: Any) -> None:
    compressor, prompt = compressor_for(model), PROMPT.repeat(1, 3)
    questions = [torch.cat([prompt, random_ids(2, 9, seed=s)], 1) for s in (1, 2)]
    with attach(model, compressor) as attached, torch.no_grad():
        prefix = attached.new_cache()
        model(prompt, past_key_values=prefix)
        for question in questions:
            fresh = attached.new_cache()
            model(prompt, past_key_values=fresh)
            expected = generate(model, fresh, question)
            for _ in range(2):
                assert torch.equal(generate(model, copy.deepcopy(prefix), question), expected)
        copied = copy.deepcopy(prefix)
    assert prefix.get_seq_length() == prompt.shape[1], "copies leave it as it was"
    mine, its = prefix.coded_layers[0], copied.coded_layers[0]
    assert copied.compressor is prefix.compressor, "codebooks are shared"
    assert mine.tensors()["key_codes"].data_ptr() != its.tensors()["key_codes"].data_ptr()
    assert its.rows is copied.rows is not prefix.rows


@pytest.mark.parametrize("family", ["llama", "mixed", "gemma3"])
def test_a_saved_prefix_continues_as_if_it_had_not_been(family: str, tmp_path: Path) -> None:
    model = mixed_model() if family == "mixed" else tiny_model(family, max_position_embeddings=1024)
    compressor = compressor_for(model)
    with attach(model, compressor) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(PROMPT.repeat(1, 2), past_key_values=cache)
        cache.save(tmp_path / "prefix.safetensors")
        loaded = VQCache.load(tmp_path / "prefix.safetensors", compressor, model.config)
        question = torch.cat([PROMPT.repeat(1, 2), random_ids(2, 9, seed=1)], 1)
        assert torch.equal(generate(model, loaded, question), generate(model, cache, question))
    assert [path.name for path in tmp_path.iterdir()] == ["prefix.safetensors"]


def mixed_model() -> PreTrainedModel:
    """A model with a full-attention layer and a sliding one, as Mistral's descendants have."""
    return tiny_model(
        "qwen2",
        max_position_embeddings=1024,
        use_sliding_window=True,
        sliding_window=16,
        max_window_layers=1,
    )


class TestStorage:
    def saved(self, model: Any, folder: Path) -> Path:
        compressor = compressor_for(model, "post")
        cache = VQCache(compressor, model.config)
        with torch.no_grad():
            model(PROMPT.repeat(1, 2), past_key_values=cache)
        cache.save(folder / "prefix")
        return folder / "prefix"

    def test_other_codebooks_are_refused(self, model: Any, tmp_path: Path) -> None:
        path = self.saved(model, tmp_path)
        other = compressor_for(model, "post", sinks=2)
        with pytest.raises(ArtefactError, match="coded with other codebooks"):
            VQCache.load(path, other, model.config)

    def test_a_damaged_file_is_refused(self, model: Any, tmp_path: Path) -> None:
        path = self.saved(model, tmp_path)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ArtefactError, match="no saved cache, or a damaged one"):
            VQCache.load(path, compressor_for(model, "post"), model.config)

    @pytest.mark.parametrize("damage", ["missing", "shortened", "flipped", "retyped", "header"])
    def test_a_file_that_is_not_as_it_was_saved_is_refused(
        self, model: Any, tmp_path: Path, damage: str
    ) -> None:
        path = self.saved(model, tmp_path)
        with safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata(), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
        codes = tensors["1.key_codes"]
        if damage == "missing":
            del tensors["1.key_codes"]
        elif damage == "shortened":
            tensors["1.key_codes"] = codes[:, :, :-1].contiguous()
        elif damage == "flipped":
            codes[0, 0, -1, -1] ^= 1
        elif damage == "retyped":
            tensors["1.key_codes"] = codes.view(torch.int8)
        else:
            metadata["vqkv"] = metadata["vqkv"].replace('"length": 120', '"length": 110')
        save_file(tensors, path, metadata)
        with pytest.raises(ArtefactError, match=r"prefix: damaged or edited: .*save .* again"):
            VQCache.load(path, compressor_for(model, "post"), model.config)

    @pytest.mark.parametrize("header", [None, "no json", "[]", '{"format": "vqkv-cache"}'])
    def test_a_file_of_another_kind_is_refused(
        self, model: Any, tmp_path: Path, header: str | None
    ) -> None:
        metadata = None if header is None else {"vqkv": header}
        save_file({"x": torch.zeros(3)}, tmp_path / "other", metadata)
        with pytest.raises(ArtefactError, match=r"other: (not a|no) saved cache"):
            VQCache.load(tmp_path / "other", compressor_for(model, "post"), model.config)

    def test_anybody_may_read_it_who_may_read_new_files(self, model: Any, tmp_path: Path) -> None:
        new = tmp_path / "new"
        new.touch()
        assert self.saved(model, tmp_path).stat().st_mode == new.stat().st_mode

    def test_it_loads_onto_a_device(self, tmp_path: Path) -> None:
        model = mixed_model()
        compressor = compressor_for(model)
        with attach(model, compressor) as attached, torch.no_grad():
            cache = attached.new_cache()
            model(PROMPT.repeat(1, 2), past_key_values=cache)
        cache.save(tmp_path / "prefix")
        loaded = VQCache.load(tmp_path / "prefix", compressor, model.config, device="meta")
        layers: list[Any] = loaded.layers
        coded, sliding = layers
        assert coded.device.type == "meta"
        held = [*coded.tensors().values(), sliding.keys, sliding.values, loaded.rows.positions]
        assert all(t is not None and t.device.type == "meta" for t in held)

    def test_an_empty_cache_is_not_saved(self, model: Any, tmp_path: Path) -> None:
        cache = VQCache(compressor_for(model, "post"), model.config)
        with pytest.raises(CacheError, match="layer 0 holds no tokens yet"):
            cache.save(tmp_path / "prefix")
        assert not list(tmp_path.iterdir())

    def test_a_full_disk_leaves_the_old_file(
        self, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = self.saved(model, tmp_path)
        before = path.read_bytes()

        def full(*args: Any, **kwargs: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("vqkv.cache.storage.save_file", full)
        with pytest.raises(OSError, match="No space left"):
            self.saved(model, tmp_path)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["prefix"]


#: Families with what is special about each.
FAMILIES = [
    *("llama", "llama-mqa", "llama-yarn", "llama3", "qwen2", "qwen3", "olmo2", "phi3"),
    *("glm", "cohere", "stablelm", "gemma3"),
]


@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, rope: str) -> None:
    """Logits through identity codes are the exact ones; pre-RoPE rounds by un-rotating."""
    model = tiny_model(family, max_position_embeddings=1024)
    ids = random_ids(2, 150)
    exact, compressor = (
        DynamicCache(config=model.config),
        compressor_for(model, rope, quantizer="identity"),
    )
    with attach(model, compressor) as attached, torch.no_grad():
        cache = attached.new_cache()
        for part in ids.split([120, 10, 10, 10], 1):
            expected = model(part, past_key_values=exact).logits
            logits = model(part, past_key_values=cache).logits
            if rope == "post":
                assert torch.equal(logits, expected)
            else:
                torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert any(layer.coded[0] for layer in cache.coded_layers.values())


def test_sliding_layers_keep_upstream_s_own_cache() -> None:
    model = mixed_model()
    compressor = compressor_for(model, quantizer="identity")
    assert compressor.geometry.compressed == (0,)
    exact = generate(model, DynamicCache(config=model.config))
    with attach(model, compressor, read="attend") as attached:
        cache = attached.new_cache()
        assert torch.equal(generate(model, cache), exact)
    assert cache.is_sliding == [False, True]


def test_mistral() -> None:
    """Without a sliding window Mistral is compressed; with one there is nothing that grows."""
    model = tiny_model("mistral", sliding_window=None, max_position_embeddings=1024)
    exact = generate(model, DynamicCache(config=model.config))
    with attach(model, compressor_for(model, quantizer="identity")) as attached:
        assert torch.equal(generate(model, attached.new_cache()), exact)
    with pytest.raises(ModelError, match="mistral: no layer has full attention"):
        compressor_for(tiny_model("mistral"))


@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize("read", ["decode", "attend"])
def test_bf16(read: Any, rope: str) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16, max_position_embeddings=1024)
    compressor = compressor_for(model, rope, quantizer="identity")
    ids = random_ids(1, 150)
    exact = DynamicCache(config=model.config)
    exact_layers: list[Any] = exact.layers
    with attach(model, compressor, read=read) as attached, torch.no_grad():
        cache = attached.new_cache()
        for part in ids.split([130, 10, 10], 1):
            expected = model(part, past_key_values=exact).logits
            logits = model(part, past_key_values=cache).logits
            if read == "decode" and rope == "post":
                assert torch.equal(logits, expected)
            else:  # scores in fp32 where SDPA rounds them to bf16; keys rotated anew
                torch.testing.assert_close(logits, expected, atol=2e-2, rtol=2e-2)
        layer = cache.coded_layers[0]
        keys = layer.read(0, 150)[0]
        assert layer.coded == [128] and keys.dtype == torch.bfloat16
        # Un-rotating and rotating in fp32 moves a key by one rounding to bf16 at most.
        torch.testing.assert_close(keys, exact_layers[0].keys, atol=1e-3, rtol=2**-7)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize("family", ["llama", "llama-mqa", "qwen3"])
def test_attending_on_codes_reads_as_decoding_them(
    family: str, rope: str, implementation: str
) -> None:
    model = tiny_model(family, max_position_embeddings=1024)
    model.set_attn_implementation(implementation)
    compressor = compressor_for(model, rope)
    ids = torch.nn.functional.pad(random_ids(3, 190), (10, 0))
    mask = torch.ones_like(ids)
    mask[0, :10], mask[1, :6] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits: dict[str, list[torch.Tensor]] = {"decode": [], "attend": []}
    for read, found in logits.items():
        with attach(model, compressor, read=read) as attached, torch.no_grad():  # type: ignore[arg-type]
            cache = attached.new_cache()
            start = 0
            for size in (150, 1, 1, 10, 38):
                stop = start + size
                with recording() as ran:
                    out = model(
                        ids[:, start:stop],
                        attention_mask=mask[:, :stop],
                        position_ids=positions[:, start:stop],
                        past_key_values=cache,
                    )
                assert ("attend.naive" in ran) == (read == "attend" and size <= 10)
                rows = mask[:, start:stop].bool()
                found.append(out.logits[rows])
                start = stop
    for a, b in zip(logits["decode"], logits["attend"], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("rope", ["pre", "post"])
def test_attending_where_new_tokens_exceed_the_window(model: Any, rope: str, window: int) -> None:
    compressor = compressor_for(model, rope, window=window)
    ids = random_ids(2, 200)
    caches, logits = {}, {}
    for read in ("decode", "attend"):
        with attach(model, compressor, read=read) as attached, torch.no_grad():
            cache = attached.new_cache()
            found = [model(ids[:, :120], past_key_values=cache).logits]
            for part in ids[:, 120:].split([1] * 20 + [10] * 6, 1):
                with recording() as ran:
                    found.append(model(part, past_key_values=cache).logits)
                assert ("attend.naive" in ran) == (read == "attend")
                exact = cache.get_seq_length() - cache.coded_layers[0].coded[0]
                assert window <= exact < window + PAGE_TOKENS
        caches[read], logits[read] = cache, torch.cat(found, 1)
    torch.testing.assert_close(logits["attend"], logits["decode"], atol=1e-5, rtol=1e-5)
    for a, b in zip(*(cache.coded_layers.values() for cache in caches.values()), strict=True):
        same = a.tensors()["key_codes"] == b.tensors()["key_codes"]
        assert same.float().mean() > 0.999  # what layer 1 codes differs by rounding in layer 0
