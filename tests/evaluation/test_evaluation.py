"""Evaluations of tiny models: both modes, the canary, passages, bytes."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from transformers import DynamicCache

from tests.cache.compressors import compressor_for, random_ids
from tests.tiny_checkpoint import tiny_text, tiny_tokenizer
from tests.tiny_models import tiny_model
from vqkv.cache import BeforeUseCache, attach
from vqkv.compressor import KVCompressor, Provenance
from vqkv.errors import ModelError, TextError
from vqkv.evaluation import Evaluation, Mode, evaluate
from vqkv.evaluation.arms import compressor_arms
from vqkv.evaluation.canary import canary_arms, destroyed, run_canary
from vqkv.evaluation.exact import ExactLogits
from vqkv.evaluation.memory import live_storage_bytes
from vqkv.evaluation.passages import _spread, repeated_passages

MODES: tuple[Mode, ...] = ("before-use", "chunked")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def coarse(model: Any) -> KVCompressor:
    """2 bits per value, no window: what there is to see shows."""
    return compressor_for(model, window=0, sinks=2)


def run(model: Any, compressor: KVCompressor, text: Path, **changes: Any) -> Evaluation:
    text.write_text(tiny_text(700))
    options = {"tokens": 256, "context": 128, "chunk": 32, "passages": 0, "canary": False}
    return evaluate(model, tiny_tokenizer(), compressor, text, **{**options, **changes})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rope", ["pre", "post"])
def test_identity_costs_nothing(model: Any, mode: Mode, rope: str, tmp_path: Path) -> None:
    compressor = compressor_for(model, rope, quantizer="identity", window=0)
    result = run(model, compressor, tmp_path / "text", mode=mode)
    assert result.kl < 1e-6
    assert result.ratio == pytest.approx(1, abs=1e-5)
    assert result.top1_agreement == 1


@pytest.mark.parametrize("mode", MODES)
def test_codes_cost_something(model: Any, coarse: KVCompressor, mode: Mode, tmp_path: Path) -> None:
    result = run(model, coarse, tmp_path / "text", mode=mode)
    assert result.kl > 1e-6
    assert result.tokens == 256 - 2  # the first token of each window has nothing before it
    assert result.interval[0] <= math.log(result.ratio) <= result.interval[1]
    assert result.chunk == (32 if mode == "chunked" else None)


def test_before_use_scores_are_those_of_one_forward_over_reconstructions(
    model: Any, coarse: KVCompressor
) -> None:
    window = random_ids(1, 100)[0]
    scores = compressor_arms(model, coarse, "before-use", 32).scores(window)
    with attach(model, coarse), torch.no_grad():
        logits = model(window[None], past_key_values=BeforeUseCache(coarse, model.config)).logits[0]
    losses = torch.nn.functional.cross_entropy(logits[:-1], window[1:], reduction="none")
    torch.testing.assert_close(scores.compressed.float(), losses, atol=1e-5, rtol=1e-5)


def test_the_exact_arm_does_not_depend_on_mode_or_chunk(model: Any, coarse: KVCompressor) -> None:
    window = random_ids(1, 100)[0]
    one = compressor_arms(model, coarse, "before-use", 1).scores(window)
    for chunk in (7, 64):
        other = compressor_arms(model, coarse, "chunked", chunk).scores(window)
        torch.testing.assert_close(other.exact, one.exact, atol=1e-5, rtol=1e-5)
    later = compressor_arms(model, coarse, "chunked", 7).scores(window, first=60)
    torch.testing.assert_close(later.exact, one.exact[59:], atol=1e-5, rtol=1e-5)


def test_kept_exact_logits_give_the_same_scores(
    model: Any, coarse: KVCompressor, tmp_path: Path
) -> None:
    window = random_ids(1, 100)[0]
    exact = ExactLogits(model, tmp_path)
    alone = compressor_arms(model, coarse, "before-use", 32).scores(window, first=40)
    for _ in range(2):  # computed, then read
        kept = compressor_arms(model, coarse, "before-use", 32, exact).scores(window, first=40)
        for name in ("exact", "compressed", "kl", "agree"):
            assert torch.equal(getattr(kept, name), getattr(alone, name))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_long_window_leaves_chunked_mode_exact(model: Any, coarse: KVCompressor) -> None:
    scores = compressor_arms(model, coarse.with_residency(window=512), "chunked", 16)
    assert float(scores.scores(random_ids(1, 200)[0]).kl.abs().max()) < 1e-5


class TestCanary:
    @pytest.mark.parametrize("mode", MODES)
    def test_destroyed_codes_change_every_score(
        self, model: Any, coarse: KVCompressor, mode: Mode
    ) -> None:
        window = random_ids(1, 200)[0]
        kept = compressor_arms(model, coarse, mode, 32).scores(window)
        broken = compressor_arms(model, destroyed(coarse), mode, 32).scores(window)
        assert broken.kl.mean() > 2 * kept.kl.mean()

    def test_an_evaluation_that_reads_no_codes_fails_it(
        self, model: Any, coarse: KVCompressor
    ) -> None:
        unread = canary_arms(model, coarse.with_residency(window=512), "chunked", 16, 200)
        checked = run_canary(unread, random_ids(1, 200)[0])
        assert not checked.ok
        assert checked.perplexity == pytest.approx(checked.perplexity_exact, rel=1e-4)

    def test_in_chunked_mode_no_window_softens_it(self, model: Any, coarse: KVCompressor) -> None:
        """What the exact window and the chunk keep readable would hide the destruction."""
        window = random_ids(1, 400)[0]
        kept = coarse.with_residency(sinks=4, window=128)
        checked = run_canary(canary_arms(model, kept, "chunked", 256, 400), window)
        bare = destroyed(coarse.with_residency(sinks=0, window=0))
        scores = compressor_arms(model, bare, "chunked", 64).scores(window)
        assert checked.perplexity == scores.perplexity

    def test_the_compressor_itself_stays_whole(self, model: Any, coarse: KVCompressor) -> None:
        x = torch.randn(1, 2, 20, 16)
        before = coarse.decode(0, "keys", coarse.encode(0, "keys", x))
        assert not destroyed(coarse).encode(0, "keys", x).codes.any()
        assert torch.equal(coarse.decode(0, "keys", coarse.encode(0, "keys", x)), before)


class TestPassages:
    def test_the_second_copy_is_scored(self, model: Any, coarse: KVCompressor) -> None:
        tokens = random_ids(1, 300)[0]
        arms = compressor_arms(model, coarse, "before-use", 32)
        found = repeated_passages(arms, tokens, (40,), 2, lambda done, total: None)
        losses = []
        for start in (0, 260):
            passage = tokens[start : start + 40]
            losses += arms.scores(torch.cat([passage, passage])).exact[39:].tolist()
        assert found.exact[40] == pytest.approx(sum(losses) / len(losses))
        assert set(found.compressed) == {40}
        assert not found.notes

    def test_lengths_that_do_not_fit_are_left_out_and_said(
        self, model: Any, coarse: KVCompressor
    ) -> None:
        arms = compressor_arms(model, coarse, "before-use", 32)
        found = repeated_passages(
            arms, random_ids(1, 300)[0], (40, 400, 600), 1, lambda done, total: None
        )
        assert set(found.exact) == {40}
        assert found.notes == [
            "passages of 400: the text has 300 tokens left",
            "passages of 600: two copies exceed 1024 positions",
        ]

    def test_each_passage_is_another(self, model: Any, coarse: KVCompressor) -> None:
        arms = compressor_arms(model, coarse, "before-use", 32)
        told: list[tuple[int, int]] = []
        found = repeated_passages(
            arms, random_ids(1, 42)[0], (40, 42), 8, lambda done, total: told.append((done, total))
        )
        assert found.notes == [
            "passages of 40: 3 of 8, the text has only 42 tokens",
            "passages of 42: 1 of 8, the text has only 42 tokens",
        ]
        assert told == [(done, 4) for done in range(1, 5)]
        tokens = random_ids(1, 42)[0]
        losses = [
            float(arms.scores(torch.cat([p, p]), first=40).exact.mean())
            for p in (tokens[start : start + 40] for start in (0, 1, 2))
        ]
        assert found.exact[40] == pytest.approx(sum(losses) / 3)

    @given(last=st.integers(0, 10**7), count=st.integers(1, 64))
    def test_starts_are_spread_from_end_to_end(self, last: int, count: int) -> None:
        starts = _spread(last, count)
        assert len(set(starts)) == len(starts) == min(count, last + 1)
        assert starts[0] == 0 and starts[-1] == (last if count > 1 else 0)


class TestNotes:
    def test_a_text_that_calibration_saw(
        self, model: Any, coarse: KVCompressor, tmp_path: Path
    ) -> None:
        assert run(model, coarse, tmp_path / "text").notes == ()
        digest = hashlib.sha256((tmp_path / "text").read_bytes()).hexdigest()
        seen = coarse.with_residency()
        seen.provenance = Provenance(None, {"text_sha256": ["another", digest]})
        (note,) = run(model, seen, tmp_path / "text").notes
        assert "was calibrated on this very text, text" in note
        # 17 tokens of it, of 33 in two texts.
        seen.provenance = Provenance(None, {"text_sha256": [digest, "another"], "tokens": 33})
        assert len(run(model, seen, tmp_path / "text", skip=16).notes) == 1
        assert run(model, seen, tmp_path / "text", skip=17).notes == ()

    @pytest.mark.parametrize("odd", [None, 7, {}])
    def test_hashes_that_are_none(self, odd: Any) -> None:
        assert Provenance(None, {"text_sha256": odd}).tokens_of("digest") == 0


class TestBytes:
    def test_they_are_those_of_a_real_cache(
        self, model: Any, coarse: KVCompressor, tmp_path: Path
    ) -> None:
        result = run(model, coarse, tmp_path / "text", tokens=512, context=512)
        values = 2 * 2 * 2 * 16  # streams, layers, heads, head dim
        assert result.cache_bytes_length == 512
        assert result.cache_bytes_exact == 2 * values * 512
        assert result.bits_per_value == coarse.bits_per_value
        assert result.side_bytes["total"] == coarse.nbytes()
        assert result.cache_bytes_window == 0

    @pytest.mark.parametrize("mode", MODES)
    def test_effective_bits_do_not_depend_on_the_models_type(
        self, coarse: KVCompressor, mode: Mode, tmp_path: Path
    ) -> None:
        compressor = coarse.with_residency(window=64)
        effective = []
        for dtype in (torch.bfloat16, torch.float32):
            model = tiny_model("llama", dtype=dtype, max_position_embeddings=1024)
            result = run(
                model, compressor, tmp_path / "text", tokens=512, context=512, mode=mode, chunk=512
            )
            assert result.window == (64 if mode == "chunked" else 0)
            assert result.cache_bytes_window == 64
            effective.append(result.effective_bits_per_value)
            if dtype == torch.bfloat16:  # exact values take 16 bits, so the tensors agree
                tensors = result.cache_bytes + coarse.nbytes()
                assert effective[0] == 16 * tensors / result.cache_bytes_exact
        assert effective[0] == effective[1]

    @pytest.mark.parametrize("rope", ["pre", "post"])
    def test_the_growth_of_all_live_storage_agrees_with_them(self, model: Any, rope: str) -> None:
        """A long generation, and every tensor of the process counted before and after."""
        compressor = compressor_for(model, rope)
        with attach(model, compressor) as attached, torch.no_grad():
            cache = attached.new_cache()
            model(random_ids(2, 8), past_key_values=cache)
            before, counted = live_storage_bytes(), cache.nbytes()["total"]
            for part in random_ids(2, 900, seed=1).split(9, 1):
                model(part, past_key_values=cache)
            del part
            grown = live_storage_bytes() - before
        assert grown == pytest.approx(cache.nbytes()["total"] - counted, rel=0.1)

    def test_tensors_that_were_traced_with_take_nothing(self) -> None:
        before = live_storage_bytes()
        with FakeTensorMode():
            traced = torch.zeros(1000)
        assert traced.shape == (1000,)  # it still lives
        assert live_storage_bytes() - before < 4000

    def test_an_exact_cache_grows_by_what_it_says_too(self, model: Any) -> None:
        """That the count above would see a hidden copy of the states."""
        cache = DynamicCache(config=model.config)
        before = live_storage_bytes()
        with torch.no_grad():
            model(random_ids(2, 500), past_key_values=cache)
        assert live_storage_bytes() - before >= 4 * 2 * 500 * 128


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 1}, "windows of 2 tokens or more"),
        ({"skip": 600}, "has 700 tokens"),
        ({"tokens": 5000}, "has 700 tokens"),
    ],
    ids=["one token", "skips all", "short text"],
)
def test_what_cannot_be_scored(
    model: Any, coarse: KVCompressor, tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(TextError, match=message):
        run(model, coarse, tmp_path / "text", **changes)


def test_windows_longer_than_the_model(model: Any, coarse: KVCompressor, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"llama: windows of 2000 tokens .* the model's 1024 pos"):
        run(model, coarse, tmp_path / "text", context=2000)


def test_an_empty_text(model: Any, coarse: KVCompressor, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(" \n")
    with pytest.raises(TextError, match="is empty"):
        evaluate(model, tiny_tokenizer(), coarse, tmp_path / "text", tokens=8, context=4)
