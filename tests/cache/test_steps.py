"""Decoding steps of fixed shapes, against ordinary forwards."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cache.compressors import random_ids
from tests.cache.test_fused import PREDICTED, byte_compressor
from tests.tiny_models import tiny_model
from vqkv.cache import VQCache, attach, static
from vqkv.cache.steps import DecodingSteps, Step, _all_real
from vqkv.compressor import KVCompressor
from vqkv.errors import KernelError
from vqkv.kernels import using

PROMPT = 170


@contextmanager
def served(
    model: Any, compressor: KVCompressor, fixed: bool = True
) -> Iterator[tuple[VQCache, DecodingSteps | None]]:
    """An empty cache of an attached model, whose forwards may be steps where they are `fixed`."""
    on_gpu = model.device.type == "cuda"
    with (
        using(**({} if on_gpu else {"attend_codes": "naive"})),
        attach(model, compressor, read="attend") as attached,
        torch.no_grad(),
        DecodingSteps(model, compressor) if fixed else nullcontext() as steps,
    ):
        yield attached.new_cache(), steps


def token_by_token(stop: int) -> list[slice]:
    """A prompt's slots, then those of one token each up to `stop`."""
    return [slice(0, PROMPT), *(slice(n, n + 1) for n in range(PROMPT, stop))]


def decoded(
    model: Any, compressor: KVCompressor, pads: tuple[int, ...], count: int, fixed: bool
) -> tuple[torch.Tensor, VQCache, int]:
    """Logits of a prompt's end and of tokens one by one; the cache, and how many were steps."""
    ids = random_ids(len(pads), PROMPT + count).to(model.device)
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    found = []
    with served(model, compressor, fixed) as (cache, steps):
        for part in token_by_token(PROMPT + count):
            out = model(
                ids[:, part],
                attention_mask=mask[:, : part.stop],
                position_ids=positions[:, part],
                past_key_values=cache,
            )
            assert out.past_key_values is cache
            found.append(out.logits[:, -1])
    return torch.stack(found, 1), cache, 0 if steps is None else steps.taken


def llama(rope: str = "pre") -> tuple[Any, KVCompressor]:
    model = tiny_model("llama", max_position_embeddings=1024)
    return model, byte_compressor(model, rope, **PREDICTED)


@contextmanager
def warmed(batch: int, pad: int = 0) -> Iterator[tuple[Any, VQCache, torch.Tensor, DecodingSteps]]:
    """A model that has taken two steps, its cache, and a token of each row; the last is padded."""
    model, compressor = llama()
    ids = random_ids(batch, PROMPT + 3)
    mask = torch.ones_like(ids)
    mask[-1, :pad] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with served(model, compressor) as (cache, steps):
        for part in token_by_token(PROMPT + 3):
            model(
                ids[:, part],
                attention_mask=mask[:, : part.stop],
                position_ids=positions[:, part],
                past_key_values=cache,
            )
        assert steps is not None
        assert steps.taken == 2
        yield model, cache, ids[:, -1:], steps


@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize("pads", [(0,), (10, 0, 80)])
@pytest.mark.parametrize("family", ["llama", "llama-yarn", "smollm3", "qwen3", "gpt_oss"])
def test_steps_give_what_forwards_give(family: str, pads: tuple[int, ...], rope: str) -> None:
    own: Any = {"layer_types": ["full_attention"] * 2} if family == "gpt_oss" else {}
    model = tiny_model(family, max_position_embeddings=1024, **own)
    compressor = byte_compressor(model, rope, **(PREDICTED if family == "llama" else {}))
    expected, cache, _ = decoded(model, compressor, pads, 140, fixed=False)
    found, other, taken = decoded(model, compressor, pads, 140, fixed=True)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    # The other forwards code two or three pages of each row, and the first sees codes come.
    assert 140 > taken >= 139 - 3 * len(pads)
    for mine, theirs in zip(cache.coded_layers.values(), other.coded_layers.values(), strict=True):
        assert mine.coded == theirs.coded and mine.get_seq_length() == theirs.get_seq_length()
        held = theirs.tensors()
        for name, tensor in mine.tensors().items():
            if name.endswith("codes"):  # there may be room for more
                coded = min(mine.coded)
                assert torch.equal(tensor[:, :, :coded], held[name][:, :, :coded])
            elif not name.endswith("side"):
                torch.testing.assert_close(held[name], tensor, atol=2e-5, rtol=2e-5)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Every step that is made."""
    found: list[Step] = []
    make = Step.__init__

    def noted(self: Step, *args: Any) -> None:
        make(self, *args)
        found.append(self)

    monkeypatch.setattr(Step, "__init__", noted)
    return found


def test_a_step_is_made_anew_where_codes_move(
    made: list[Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(static, "ROOM", 0)
    monkeypatch.setattr(static, "ROOM_PART", 1 << 20)
    model, compressor = llama()
    expected, *_ = decoded(model, compressor, (0, 5), 140, fixed=False)
    found, *_ = decoded(model, compressor, (0, 5), 140, fixed=True)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    assert len(made) == 3  # two pages are coded of either row, those of both at a time


def test_generation_takes_steps_and_the_model_stays_as_it_was() -> None:
    model, compressor = llama()
    ids, forward = random_ids(2, PROMPT), model.forward
    settings = {"max_new_tokens": 90, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with using(attend_codes="naive"), attach(model, compressor, read="attend") as attached:
        expected = model.generate(ids, past_key_values=attached.new_cache(), **settings)
        with DecodingSteps(model, compressor) as steps:
            cache = attached.new_cache()
            replaced = model.forward
            with DecodingSteps(model, compressor):
                assert model.forward != replaced
            assert model.forward == replaced
            found = model.generate(ids, past_key_values=cache, **settings)
        assert model.forward == forward and "forward" not in vars(model)
    assert torch.equal(found, expected) and steps.taken > 80
    assert not cache.rows.steps


def test_what_happens_between_steps_is_seen() -> None:
    """Cropped, reordered, continued in another mode: the next steps read what is there then."""
    model, compressor = llama()
    ids = random_ids(2, PROMPT + 40)

    def run(fixed: bool) -> tuple[list[torch.Tensor], int]:
        found = []
        with served(model, compressor, fixed) as (cache, steps):

            def forward(start: int, stop: int) -> None:
                found.append(model(ids[:, start:stop], past_key_values=cache).logits[:, -1].clone())

            with torch.inference_mode():
                forward(0, PROMPT)
                for start in range(PROMPT, PROMPT + 8):
                    forward(start, start + 1)
            forward(PROMPT + 8, PROMPT + 9)
            cache.crop(-5)
            forward(PROMPT + 4, PROMPT + 5)
            cache.reorder_cache(torch.tensor([1, 0]))
            for start in range(PROMPT + 5, PROMPT + 12):
                forward(start, start + 1)
            cache.crop(-80)  # into the codes
            for start in range(PROMPT - 68, PROMPT + 40):  # up to and over the page's end
                forward(start, start + 1)
        return found, 0 if steps is None else steps.taken

    (expected, _), (found, taken) = run(False), run(True)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    assert taken >= 90


def test_a_cache_that_goes_takes_its_step_along(made: list[Step]) -> None:
    model, compressor = llama()
    ids = random_ids(1, PROMPT + 4)
    with served(model, compressor) as (cache, _):
        for part in token_by_token(PROMPT + 4):
            model(ids[:, part], past_key_values=cache)
        assert len(made) == 1
        made.clear()
        gone = weakref.ref(cache.coded_layers[0])
        gc.disable()
        try:
            del cache
            assert gone() is None
        finally:
            gc.enable()


def test_positions_that_skip_are_left_to_forwards(made: list[Step]) -> None:
    model, compressor = llama()
    ids = random_ids(1, PROMPT + 8)
    positions = torch.arange(PROMPT + 8)[None] + 7 * (torch.arange(PROMPT + 8) > 50)
    found = []
    for fixed in (False, True):
        with served(model, compressor, fixed) as (cache, _):
            for part in token_by_token(PROMPT + 8):
                given = {"position_ids": positions[:, part], "past_key_values": cache}
                out = model(ids[:, part], **given)
            found.append(out.logits[:, -1])
    torch.testing.assert_close(*found)
    assert not made


def test_steps_within_steps() -> None:
    model, compressor = llama()
    ids = random_ids(1, PROMPT + 12)
    prompt, *tokens = token_by_token(PROMPT + 12)
    with served(model, compressor) as (cache, outer):
        for part in (prompt, *tokens[:4]):
            model(ids[:, part], past_key_values=cache)
        with DecodingSteps(model, compressor) as inner:
            for part in tokens[4:8]:
                model(ids[:, part], past_key_values=cache)
        for part in tokens[8:]:
            model(ids[:, part], past_key_values=cache)
    assert outer is not None
    assert (outer.taken, inner.taken) == (8, 3)  # the inner one's first is the outer one's
    assert cache.get_seq_length() == PROMPT + 12


def test_a_beam_search_makes_no_steps(made: list[Step]) -> None:
    """Rows change places after every forward, and codes with them."""
    model, compressor = llama()
    ids = random_ids(1, PROMPT)
    settings = {"max_new_tokens": 30, "num_beams": 3, "do_sample": False}
    texts = []
    for fixed in (False, True):
        with served(model, compressor, fixed) as (cache, _):
            texts.append(model.generate(ids, past_key_values=cache, **settings))
    assert torch.equal(*texts) and not made


def test_a_cache_is_saved_and_copied_between_steps(tmp_path: Path) -> None:
    model, compressor = llama()
    _, cache, _ = decoded(model, compressor, (0,), 20, fixed=True)
    cache.save(tmp_path / "prefix.safetensors")
    saved = VQCache.load(tmp_path / "prefix.safetensors", compressor, model.config)
    for other in (saved, copy.deepcopy(cache)):
        for mine, theirs in zip(
            cache.coded_layers.values(), other.coded_layers.values(), strict=True
        ):
            held = theirs.tensors()
            for name, tensor in mine.tensors().items():
                assert torch.equal(tensor, held[name])


@pytest.mark.parametrize(
    "others",
    [
        {"output_hidden_states": True},
        {"use_cache": False},
        {"return_dict": False},
        {"attention_mask": (torch.arange(PROMPT + 4) != 20)[None].long()},
    ],
)
def test_other_forwards_are_no_steps(others: dict[str, Any]) -> None:
    with warmed(1) as (model, cache, ids, steps):
        model(ids, past_key_values=cache, **others)
        assert steps.taken == 2
        model(ids, past_key_values=cache)
        assert steps.taken == 3


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16])
def test_a_hole_in_a_long_mask_is_seen(dtype: torch.dtype) -> None:
    """Sums of half precision would round it away."""
    mask = torch.ones(1, 1024).to(dtype)
    assert _all_real(mask, [0], 1024)
    mask[:, 500] = 0
    assert not _all_real(mask, [0], 1024)


def test_a_config_that_asks_for_more_is_heard() -> None:
    with warmed(1) as (model, cache, ids, steps):
        model.config.output_hidden_states = True
        assert model(ids, past_key_values=cache).hidden_states
        assert steps.taken == 2


def test_padding_needs_positions() -> None:
    with warmed(2, pad=4) as (model, cache, ids, steps):
        mask = torch.ones(2, PROMPT + 4).half()
        mask[1, :4] = 0
        model(ids, past_key_values=cache, attention_mask=mask)
        assert steps.taken == 2
        positions = torch.tensor([[PROMPT + 4], [PROMPT]])
        mask = torch.cat([mask, mask[:, -1:]], 1)
        model(ids, past_key_values=cache, attention_mask=mask, position_ids=positions)
        assert steps.taken == 3


def test_states_of_another_type_are_taken() -> None:
    """As where a prefix of another type was loaded."""
    with warmed(1) as (model, cache, ids, steps):
        model.bfloat16()
        assert model(ids, past_key_values=cache).logits.isfinite().all()
        assert steps.taken == 3


def test_codes_that_a_long_forward_moves_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static, "ROOM", 64)
    with warmed(1) as (model, cache, ids, _):
        old = weakref.ref(cache.coded_layers[0].stores[0].codes)
        model(ids.expand(1, 400), past_key_values=cache)
        assert old() is None


def test_graphs_need_a_gpu() -> None:
    model, compressor = llama()
    with (
        pytest.raises(KernelError, match="and the model is on cpu"),
        attach(model, compressor, graphs=True),
    ):
        pass


class _Captured(TorchDispatchMode):
    """Refuses what waits for a device, which a capture does not survive; notes the rest."""

    WAITING = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "unique", "lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        assert not name.startswith(self.WAITING), name
        self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize("family", ["llama", "qwen3_vl"])
def test_a_step_waits_for_nothing_and_is_the_same_each_time(
    family: str, rope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family, max_position_embeddings=1024)
    compressor = byte_compressor(model, rope, **PREDICTED)
    made: list[list[str]] = []
    step = Step._step

    def noted(self: Step) -> torch.Tensor:
        with _Captured() as captured:
            logits = step(self)
        made.append(captured.names)
        return logits

    monkeypatch.setattr(Step, "_step", noted)
    with using(attend_rest="naive"):
        decoded(model, compressor, (0, 5), 100, fixed=True)
    assert len(made) > 90 and all(names == made[0] for names in made)
