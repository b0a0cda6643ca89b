"""Scores of two arms' logits."""

from __future__ import annotations

import math

import pytest
import torch

from vqkv.evaluation.scoring import BLOCK, Scores, score


def logits(seed: int, tokens: int = 300, vocabulary: int = 11) -> torch.Tensor:
    return torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed))


def test_equal_arms_score_alike() -> None:
    exact = logits(0)
    scores = score(exact, exact, torch.arange(300) % 11)
    assert scores.kl.abs().max() < 1e-6
    assert torch.equal(scores.agree, torch.ones(300, dtype=torch.float64))
    assert scores.log_ratio == 0
    assert scores.interval() == (0.0, 0.0)


def test_figures_by_hand() -> None:
    exact = torch.tensor([[0.8, 0.2], [0.5, 0.5]]).log()
    compressed = torch.tensor([[0.6, 0.4], [0.9, 0.1]]).log()
    scores = score(exact, compressed, torch.tensor([0, 1]))
    assert scores.perplexity_exact == pytest.approx((0.8 * 0.5) ** -0.5)
    assert scores.perplexity == pytest.approx((0.6 * 0.1) ** -0.5)
    assert scores.log_ratio == pytest.approx(math.log(scores.perplexity / scores.perplexity_exact))
    first = 0.8 * math.log(0.8 / 0.6) + 0.2 * math.log(0.2 / 0.4)
    assert float(scores.kl[0]) == pytest.approx(first, abs=1e-6)


def test_kl_is_never_negative_and_sees_what_perplexity_does_not() -> None:
    exact, compressed = logits(0), logits(1)
    assert score(exact, compressed, torch.zeros(300, dtype=torch.long)).kl.min() >= -1e-6
    # Two losses that cancel: the perplexities agree, the distributions do not.
    exact = torch.tensor([[0.8, 0.2], [0.2, 0.8]]).log()
    swapped = score(exact, exact.flip(0), torch.tensor([0, 0]))
    assert swapped.log_ratio == pytest.approx(0)
    assert float(swapped.kl.mean()) > 0.5


def test_blocks_of_rows_give_what_all_rows_at_once_do() -> None:
    exact, compressed, targets = logits(0), logits(1), torch.arange(300) % 11
    whole = score(exact, compressed, targets)
    parts = [
        score(exact[i : i + 77], compressed[i : i + 77], targets[i : i + 77])
        for i in range(0, 300, 77)
    ]
    torch.testing.assert_close(Scores.joined(parts).kl, whole.kl)


def test_the_interval_holds_the_mean_and_narrows_with_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    few, many = (
        Scores(
            torch.zeros(n, dtype=torch.float64),
            torch.randn(n, generator=generator, dtype=torch.float64) + 0.1,
            torch.zeros(n, dtype=torch.float64),
            torch.zeros(n, dtype=torch.float64),
        )
        for n in (40 * BLOCK, 640 * BLOCK)
    )
    widths = []
    for scores in (few, many):
        low, high = scores.interval()
        assert low < scores.log_ratio < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2  # 16 times the tokens: about a quarter
