"""One cache's inner life: what is coded when, and that it stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tests.cache.compressors import compressor_for, random_ids
from tests.tiny_models import tiny_model
from vqkv.cache import VQCache, attach
from vqkv.errors import ArtefactError, CacheError, NotFittedError, StateError
from vqkv.layouts import PAGE_TOKENS

WINDOW, SINKS = 10, 3


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", max_position_embeddings=1024)


def feed(model: Any, cache: Any, ids: torch.Tensor, chunk: int = 1, **kwargs: Any) -> None:
    with torch.no_grad():
        for part in ids.split(chunk, 1):
            model(part, past_key_values=cache, **kwargs)


def codes_of(cache: VQCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Written codes of each layer's keys and values, cut to what row 0 has coded."""
    found = []
    for layer in cache.coded_layers.values():
        tensors = layer.tensors()
        n = layer.coded[0]
        found.append((tensors["key_codes"][:1, :, :n], tensors["value_codes"][:1, :, :n]))
    return found


def keys_of(cache: VQCache, length: int) -> torch.Tensor:
    """What attention reads as the keys of layer 0."""
    return cache.coded_layers[0].read(0, length)[0]


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_codes_are_final_and_the_tail_holds_the_window(model: Any, chunk: int) -> None:
    compressor = compressor_for(model, window=WINDOW, sinks=SINKS)
    ids = random_ids(1, 300)
    with attach(model, compressor) as attached:
        cache = attached.new_cache()
        before = codes_of(cache) if cache.coded_layers[0].is_initialized else []
        for part in ids.split(chunk, 1):
            feed(model, cache, part, chunk)
            length = cache.get_seq_length()
            now = codes_of(cache)
            for old, new in zip(before, now, strict=False):
                for a, b in zip(old, new, strict=True):
                    assert torch.equal(a, b[:, :, : a.shape[2]]), "a code changed"
            before = now
            for layer in cache.coded_layers.values():
                assert layer.coded[0] % PAGE_TOKENS == 0
                exact = length - layer.coded[0]
                assert exact == length if length < WINDOW else exact >= WINDOW
                assert exact <= WINDOW + PAGE_TOKENS - 1
        assert before[0][0].shape[2] == (300 - WINDOW) // PAGE_TOKENS * PAGE_TOKENS


def test_sinks_and_tail_are_exact_and_the_rest_is_the_codec_s(model: Any) -> None:
    compressor = compressor_for(model, "post", window=WINDOW, sinks=SINKS)
    ids = random_ids(1, 200)
    exact, cache = DynamicCache(), VQCache(compressor, model.config)
    with torch.no_grad():  # one forward: what is cached does not depend on what is read
        model(ids, past_key_values=exact)
        model(ids, past_key_values=cache)
    exact_layers: list[Any] = exact.layers
    for index, layer in cache.coded_layers.items():
        coded = layer.coded[0]
        assert coded == 128
        keys, values = layer.read(0, 200)
        for read, truth, stream in (
            (keys, exact_layers[index].keys, "keys"),
            (values, exact_layers[index].values, "values"),
        ):
            assert torch.equal(read[:, :, :SINKS], truth[:, :, :SINKS])
            assert torch.equal(read[:, :, coded:], truth[:, :, coded:])
            encoded = compressor.encode(index, stream, truth[:, :, :coded])  # type: ignore[arg-type]
            decoded = compressor.decode(index, stream, encoded)  # type: ignore[arg-type]
            assert torch.equal(read[:, :, SINKS:coded], decoded[:, :, SINKS:])
            assert not torch.equal(read[:, :, SINKS:coded], truth[:, :, SINKS:coded])
        assert torch.equal(layer.read(50, 150)[0], keys[:, :, 50:150])


def test_pre_rope_codes_are_those_of_the_unrotated_keys(model: Any) -> None:
    compressor = compressor_for(model, "pre", window=WINDOW)
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        layer.self_attn.k_proj.register_forward_hook(
            lambda module, args, out, i=i: seen.__setitem__(i, out)
        )
        for i, layer in enumerate(model.model.layers)
    ]
    with attach(model, compressor) as attached:
        cache = attached.new_cache()
        feed(model, cache, random_ids(1, 150), 150)
    for hook in hooks:
        hook.remove()
    geometry = compressor.geometry
    for index, layer in cache.coded_layers.items():
        keys = seen[index].unflatten(-1, (geometry.kv_heads, geometry.head_dim)).transpose(1, 2)
        encoded = compressor.encode(index, "keys", keys[:, :, : layer.coded[0]])
        stored = layer.tensors()["key_codes"][0, :, : layer.coded[0]].transpose(0, 1)
        assert (stored == encoded.codes).float().mean() > 0.999  # rounding may flip a near-tie


@pytest.mark.parametrize("pads", [[0, 37, 5], [37, 5, 20]], ids=["some padded", "all padded"])
@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize("family", ["llama", "llama-mqa"])
def test_a_padded_row_is_coded_as_the_same_row_alone(
    family: str, rope: str, pads: list[int]
) -> None:
    model: Any = tiny_model(family, max_position_embeddings=1024)
    compressor = compressor_for(model, rope, window=WINDOW, sinks=SINKS)
    rows = [random_ids(1, 180 - pad, seed=pad) for pad in pads]
    ids = torch.cat(
        [torch.nn.functional.pad(row, (pad, 0)) for row, pad in zip(rows, pads, strict=True)]
    )
    mask = torch.ones_like(ids)
    for index, pad in enumerate(pads):
        mask[index, :pad] = 0
    options = {"max_new_tokens": 60, "do_sample": False, "pad_token_id": 0}
    with attach(model, compressor) as attached:
        together = attached.new_cache()
        batch = model.generate(ids, attention_mask=mask, past_key_values=together, **options)
        for index, (row, pad) in enumerate(zip(rows, pads, strict=True)):
            alone = attached.new_cache()
            single = model.generate(row, past_key_values=alone, **options)
            assert torch.equal(batch[index, pad:], single[0])
            for a, b in zip(
                together.coded_layers.values(), alone.coded_layers.values(), strict=True
            ):
                n = b.coded[0]
                assert a.coded[index] == n > 0
                for name in ("key_codes", "value_codes"):
                    same = a.tensors()[name][index, :, :n] == b.tensors()[name][0, :, :n]
                    assert same.float().mean() > 0.999  # batched products round otherwise


class TestPadding:
    """Two rows of 150 slots, the first with 10 of padding."""

    ids = torch.nn.functional.pad(random_ids(2, 140), (10, 0))
    mask = torch.ones(2, 160, dtype=torch.long)
    mask[0, :10] = 0

    def filled(self, model: Any, attached: Any) -> VQCache:
        cache: VQCache = attached.new_cache()
        feed(model, cache, self.ids, 150, attention_mask=self.mask[:, :150])
        assert cache.coded_layers[0].coded == [128, 128]
        return cache

    @pytest.mark.parametrize("rope", ["pre", "post"])
    def test_it_stays_where_a_forward_brings_no_mask(self, model: Any, rope: str) -> None:
        with attach(model, compressor_for(model, rope, window=WINDOW)) as attached:
            cache = self.filled(model, attached)
            before = keys_of(cache, 150)
            feed(model, cache, random_ids(2, 1))
            assert cache.rows.pads == [10, 0]
            assert torch.equal(keys_of(cache, 150), before)

    @pytest.mark.parametrize("rope", ["pre", "post"])
    def test_other_padding_under_coded_tokens_is_refused(self, model: Any, rope: str) -> None:
        with attach(model, compressor_for(model, rope, window=WINDOW)) as attached:
            cache = self.filled(model, attached)
            before = keys_of(cache, 150)
            with pytest.raises(CacheError, match=r"row 0 was coded with 10 slots .* now says 0"):
                feed(model, cache, random_ids(2, 1), attention_mask=torch.ones(2, 151))
            feed(model, cache, random_ids(2, 1), attention_mask=self.mask[:, :151])
            assert torch.equal(keys_of(cache, 150), before)

    def test_padding_that_an_unattached_cache_has_coded_is_refused_later(self, model: Any) -> None:
        compressor = compressor_for(model, "post", window=WINDOW)
        cache = VQCache(compressor, model.config)
        feed(model, cache, self.ids, 150, attention_mask=self.mask[:, :150])
        refused = pytest.raises(CacheError, match=r"row 0 was coded with 0 slots .* now says 10")
        with attach(model, compressor), refused:
            feed(model, cache, random_ids(2, 1), attention_mask=self.mask[:, :151])

    def test_slots_that_the_tail_has_dropped_do_not_come_back(self, model: Any) -> None:
        """A row of padding alone has nothing coded, but its slots go with those of other rows."""
        mask = torch.ones(2, 151, dtype=torch.long)
        mask[0, :140] = 0
        with attach(model, compressor_for(model, "post", window=WINDOW)) as attached:
            cache = attached.new_cache()
            feed(model, cache, self.ids, 150, attention_mask=mask[:, :150])
            assert cache.coded_layers[0].coded == [0, 128]
            with pytest.raises(CacheError, match=r"row 0 .* 140 .* now says 0"):
                feed(model, cache, random_ids(2, 1), attention_mask=torch.ones(2, 151))

    def test_another_batch_leaves_it_as_it_was(self, model: Any) -> None:
        with attach(model, compressor_for(model, "post", window=WINDOW)) as attached:
            cache = self.filled(model, attached)
            with pytest.raises(CacheError, match="the cache holds 2 rows, given 3"):
                feed(model, cache, random_ids(3, 1), attention_mask=torch.ones(3, 151))
            assert cache.rows.pads == [10, 0]


class TestCrop:
    def test_inside_the_tail_it_is_exact(self, model: Any) -> None:
        compressor = compressor_for(model, window=WINDOW)
        ids = random_ids(1, 170)
        with attach(model, compressor) as attached:
            cropped, straight = attached.new_cache(), attached.new_cache()
            feed(model, cropped, ids[:, :150], 150)
            feed(model, straight, ids[:, :150], 150)
            feed(model, cropped, random_ids(1, 4, seed=5))
            cropped.crop(-4)
            assert cropped.get_seq_length() == 150
            for a, b in zip(
                cropped.coded_layers.values(), straight.coded_layers.values(), strict=True
            ):
                assert all(
                    torch.equal(x, y) for x, y in zip(a.read(0, 150), b.read(0, 150), strict=True)
                )

    def test_deeper_it_cuts_the_last_page_and_keeps_the_codes_before(self, model: Any) -> None:
        compressor = compressor_for(model, window=WINDOW)
        ids = random_ids(1, 300)
        with attach(model, compressor) as attached:
            cache = attached.new_cache()
            feed(model, cache, ids[:, :150], 150)
            kept = [tuple(t[:, :, :90].clone() for t in pair) for pair in codes_of(cache)]
            cache.crop(-60)
            assert [layer.coded for layer in cache.coded_layers.values()] == [[90], [90]]
            feed(model, cache, ids[:, 90:], 30)
            assert cache.get_seq_length() == 300
            for layer in cache.coded_layers.values():
                assert layer.coded == [256]
            for old, new in zip(kept, codes_of(cache), strict=True):
                for a, b in zip(old, new, strict=True):
                    assert torch.equal(a, b[:, :, :90])

    def test_to_nothing_and_on(self, model: Any) -> None:
        compressor = compressor_for(model, "post", window=WINDOW, sinks=SINKS)
        cache = VQCache(compressor, model.config)
        ids = random_ids(1, 150)
        feed(model, cache, random_ids(1, 100, seed=3), 100)
        cache.crop(-100)
        feed(model, cache, ids, 150)
        fresh = VQCache(compressor, model.config)
        feed(model, fresh, ids, 150)
        assert torch.equal(
            cache.coded_layers[0].read(0, 150)[0], fresh.coded_layers[0].read(0, 150)[0]
        )

    @pytest.mark.parametrize("count", [1, -151])
    def test_wrong_counts(self, model: Any, count: int) -> None:
        cache = VQCache(compressor_for(model, "post"), model.config)
        feed(model, cache, random_ids(1, 150), 150)
        with pytest.raises(CacheError, match=f"a count from -150 to 0, given {count}"):
            cache.crop(count)


def test_recorded_candidates_leave_no_trace(model: Any) -> None:
    """What assisted decoding does: forward candidates, then crop those that were wrong."""
    compressor = compressor_for(model, window=WINDOW)
    ids = random_ids(1, 160)
    with attach(model, compressor) as attached:
        tried, straight = attached.new_cache(), attached.new_cache()
        for cache in (tried, straight):
            feed(model, cache, ids[:, :136], 136)
            cache.activate_past_recording()
        for step in range(136, 146):
            feed(model, tried, random_ids(1, 5, seed=step), 5)
            tried.crop(-5)
            feed(model, tried, ids[:, step : step + 1])
            feed(model, straight, ids[:, step : step + 1])
        assert tried.coded_layers[0].coded == straight.coded_layers[0].coded
        for a, b in zip(tried.coded_layers.values(), straight.coded_layers.values(), strict=True):
            assert torch.equal(a.read(0, 146)[0], b.read(0, 146)[0])


def test_bytes_are_those_of_all_tensors_and_no_copy_of_the_history_hides(model: Any) -> None:
    compressor = compressor_for(model, window=WINDOW)
    with attach(model, compressor) as attached:
        cache = attached.new_cache()
        feed(model, cache, random_ids(2, 700), 50)
    assert cache.nbytes()["total"] == reachable_bytes(cache)
    per_token = 2 * compressor.bytes_per_token * (1 + 1 / 16)
    assert cache.nbytes()["codes"] <= per_token * (700 + PAGE_TOKENS)


@pytest.mark.parametrize("deep", [4, 60, 149])
def test_cropping_frees_what_was_cut_off(model: Any, deep: int) -> None:
    with attach(model, compressor_for(model, window=100)) as attached:
        cache = attached.new_cache()
        feed(model, cache, random_ids(1, 150), 150)
        cache.crop(-deep)
    assert cache.nbytes()["total"] == reachable_bytes(cache)


def test_reset_frees_everything(model: Any) -> None:
    with attach(model, compressor_for(model, window=WINDOW)) as attached:
        cache = attached.new_cache()
        feed(model, cache, random_ids(2, 150), 150)
        cache.activate_past_recording()
        cache.reset()
        assert cache.nbytes()["total"] == reachable_bytes(cache) == 0
        feed(model, cache, random_ids(2, 150), 150)
        assert cache.coded_layers[0].coded == [128, 128], "recording ends with what it recorded"


def reachable_bytes(cache: VQCache) -> int:
    """Storage bytes of every tensor that hangs on the cache, its compressor and model left out."""
    skipped = {id(cache.compressor), id(cache.rows.rotary)}
    storages: dict[int, int] = {}
    waiting: list[Any] = [cache]
    seen: set[int] = set()
    while waiting:
        item = waiting.pop()
        if id(item) in seen or id(item) in skipped:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, list | tuple | set):
            waiting += item
        elif isinstance(item, dict):
            waiting += item.values()
        elif hasattr(item, "__dict__") and type(item).__module__.startswith(
            ("vqkv", "transformers")
        ):
            waiting += vars(item).values()
    return sum(storages.values())


def test_reset_takes_another_batch(model: Any) -> None:
    compressor = compressor_for(model, window=WINDOW)
    with attach(model, compressor) as attached:
        cache = attached.new_cache()
        feed(model, cache, random_ids(2, 150), 150)
        with pytest.raises(CacheError, match="the cache holds 2 rows, given 3"):
            feed(model, cache, random_ids(3, 1))
        cache.reset()
        assert cache.get_seq_length() == 0
        feed(model, cache, random_ids(3, 150), 150)
        fresh = attached.new_cache()
        feed(model, fresh, random_ids(3, 150), 150)
        assert torch.equal(
            cache.coded_layers[0].read(0, 150)[0], fresh.coded_layers[0].read(0, 150)[0]
        )


def test_prefetch_and_offload_move_every_tensor(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta device stands in for an accelerator."""
    cache = VQCache(compressor_for(model, "post", window=WINDOW), model.config)
    feed(model, cache, random_ids(1, 150), 150)
    layer = cache.coded_layers[1]
    layer.device = torch.device("meta")
    layer.prefetch()
    assert {t.device.type for t in layer.tensors().values()} == {"meta"}
    # Nothing comes back from there, so what would is put in its place.
    held = {name: t.shape for name, t in layer.tensors().items()}
    monkeypatch.setattr(torch.Tensor, "to", lambda t, to, **_: torch.ones_like(t, device=to))
    layer.offload()
    assert {t.device.type for t in layer.tensors().values()} == {"cpu"}
    assert {name: t.shape for name, t in layer.tensors().items()} == held


def test_offload_and_prefetch_keep_everything(model: Any) -> None:
    cache = VQCache(compressor_for(model, "post", window=WINDOW), model.config)
    feed(model, cache, random_ids(1, 150), 150)
    layer = cache.coded_layers[1]
    before = layer.read(0, 150)
    layer.offload()
    layer.prefetch()
    for a, b in zip(layer.read(0, 150), before, strict=True):
        assert torch.equal(a, b)


def test_rows_are_selected_where_no_model_told_of_them(model: Any) -> None:
    cache = VQCache(compressor_for(model, "post", window=WINDOW), model.config)
    feed(model, cache, random_ids(3, 150), 150)
    before = keys_of(cache, 150)
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert torch.equal(keys_of(cache, 150), before[[2, 0]])


def test_padding_that_came_in_chunks_leaves_the_tail(model: Any) -> None:
    pads, ids = torch.tensor([120, 150]), random_ids(2, 200)
    mask = (torch.arange(200) >= pads[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with attach(model, compressor_for(model, "pre", window=100)) as attached, torch.no_grad():
        cache = attached.new_cache()
        for stop, tail_start in ((100, 100), (200, 120)):
            part = slice(stop - 100, stop)
            model(
                ids[:, part],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, part],
                past_key_values=cache,
            )
            assert cache.coded_layers[0].tail_start == tail_start


@pytest.mark.parametrize("rope", ["pre", "post"])
def test_rows_follow_reorder_repeat_and_select(model: Any, rope: str) -> None:
    compressor = compressor_for(model, rope, window=WINDOW, sinks=SINKS)
    ids = torch.nn.functional.pad(random_ids(3, 140), (10, 0))
    mask = torch.ones_like(ids)
    mask[1, :10] = 0
    mask[0, :4] = 0
    with attach(model, compressor) as attached:
        cache = attached.new_cache()
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        feed(model, cache, ids, 150, attention_mask=mask, position_ids=positions)
        layer = cache.coded_layers[1]

        def row(index: int) -> torch.Tensor:
            return layer.read(0, 150)[0][index]

        rows = [row(i).clone() for i in range(3)]
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        assert all(torch.equal(row(new), rows[old]) for new, old in enumerate([2, 0, 1]))
        cache.batch_repeat_interleave(2)
        assert all(torch.equal(row(new), rows[old]) for new, old in enumerate([2, 2, 0, 0, 1, 1]))
        cache.batch_select_indices(torch.tensor([5, 0]))
        assert torch.equal(row(0), rows[1])
        assert torch.equal(row(1), rows[2])


def test_pre_rope_without_an_attached_model(model: Any) -> None:
    cache = VQCache(compressor_for(model, "pre"), model.config)
    with pytest.raises(CacheError, match=r"before RoPE.*with vqkv\.attach\(model"):
        feed(model, cache, random_ids(1, 5), 5)


def test_a_cache_of_an_ended_attachment_is_refused_too(model: Any) -> None:
    compressor = compressor_for(model, "pre")
    with attach(model, compressor) as attached:
        cache = attached.new_cache()
        feed(model, cache, random_ids(1, 5), 5)
    with pytest.raises(CacheError, match="before RoPE"):
        feed(model, cache, random_ids(1, 1))
    with attach(model, compressor):
        feed(model, cache, random_ids(1, 1))
    assert cache.get_seq_length() == 6


def test_another_geometry_shows_both(model: Any) -> None:
    compressor = compressor_for(model, "post")
    other = tiny_model("llama-mqa")
    with pytest.raises(ArtefactError, match=r"kv_heads.*2.*1"):
        VQCache(compressor, other.config)


def test_nan_names_layer_and_stream(model: Any) -> None:
    cache = VQCache(compressor_for(model, "post", window=WINDOW), model.config)
    states = torch.randn(1, 2, 150, 16)
    bad = states.clone()
    bad[0, 1, 7, 3] = torch.nan
    with pytest.raises(StateError, match=r"values of layer 1.*nan"):
        cache.update(states, bad, 1)


def test_a_scheme_that_was_never_calibrated(model: Any) -> None:
    from tests.cache.compressors import scheme_dict
    from vqkv.compressor import KVCompressor
    from vqkv.geometry import Geometry
    from vqkv.scheme_files import scheme_from_dict

    compressor = KVCompressor(scheme_from_dict(scheme_dict()), Geometry.from_model(model))
    with pytest.raises(NotFittedError, match="calibrate it first"):
        VQCache(compressor, model.config)


@pytest.mark.parametrize("read", ["decode", "attend"])
def test_a_prefix_of_inference_mode_goes_on_without(model: Any, read: Any) -> None:
    """After a crop, sinks and pages that were made in it are written to again."""
    compressor = compressor_for(model, window=WINDOW, sinks=100)
    ids = random_ids(1, 330)
    caches = []
    with attach(model, compressor, read=read) as attached:
        for mode in (torch.no_grad, torch.inference_mode):
            cache = attached.new_cache()
            with mode():
                model(ids[:, :300], past_key_values=cache)
                cache.crop(-210)
            feed(model, cache, ids[:, 90:], 10)
            caches.append(cache)
        for one, other in zip(*(cache.coded_layers.values() for cache in caches), strict=True):
            for a, b in zip(one.read(0, 330), other.read(0, 330), strict=True):
                assert torch.equal(a, b)
