"""Beam search and refinement: never worse than greedy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqkv.errors import SchemeError, StateError
from vqkv.kernels.decode import decode
from vqkv.kernels.encode import encode
from vqkv.quantizers.residual import ResidualConfig, ResidualQuantizer
from vqkv.quantizers.search import beam_search, better, refine


def errors(x: torch.Tensor, books: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return (x - decode(codes, books)).square().sum(-1)


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    books, stages, size, dim = (draw(st.integers(1, n)) for n in (3, 4, 6, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    x = torch.randn(draw(st.integers(0, 9)), books, dim, generator=generator)
    return x, torch.randn(books, stages, size, dim, generator=generator)


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(1, 8))
def test_a_beam_is_never_worse_than_greedy(
    problem: tuple[torch.Tensor, torch.Tensor], width: int
) -> None:
    x, books = problem
    found = beam_search(x, books, width)
    assert found.shape == (*x.shape[:2], books.shape[1])
    assert bool((errors(x, books, found) <= errors(x, books, encode(x, books)) + 1e-5).all())


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(1, 3))
def test_refinement_is_never_worse_than_what_it_starts_from(
    problem: tuple[torch.Tensor, torch.Tensor], rounds: int
) -> None:
    x, books = problem
    start = encode(x, books)
    found = refine(x, books, start, rounds)
    assert bool((errors(x, books, found) <= errors(x, books, start)).all())


def test_a_beam_as_wide_as_all_sums_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 1, 3, generator=generator)
    books = torch.randn(1, 3, 4, 3, generator=generator)
    every = torch.cartesian_prod(*[torch.arange(4)] * 3)  # [64, 3]
    sums = decode(every.unsqueeze(1), books)[:, 0]
    best = torch.cdist(x[:, 0], sums).amin(1).square()
    torch.testing.assert_close(
        errors(x, books, beam_search(x, books, 64))[:, 0], best, atol=1e-5, rtol=1e-5
    )


def test_they_pay_on_gaussian_data() -> None:
    x = torch.randn(2000, 2, 8, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, search in {"greedy": {}, "beam": {"beam": 8}, "refine": {"refine": 3}}.items():
        quantizer = ResidualQuantizer(depth=3, code_bits=4, **search)  # type: ignore[arg-type]
        quantizer.fit(x, seed=0)
        found[name] = float((quantizer.decode(quantizer.encode(x)) - x).square().mean())
    assert found["beam"] < 0.98 * found["greedy"]
    assert found["refine"] < found["greedy"]


def test_equal_codes_stay() -> None:
    x, books = torch.zeros(1, 1, 2), torch.ones(1, 1, 2, 2)
    first, second = torch.tensor([[[0]]]), torch.tensor([[[1]]])
    assert torch.equal(better(x, books, first, second), first)


class TestRate:
    def test_it_gives_the_depth_that_the_dim_needs(self) -> None:
        config = ResidualConfig(rate=4.375, code_bits=10)
        assert (config.stages(128), config.stages(64)) == (56, 28)

    @pytest.mark.parametrize(
        ("rate", "dim", "message"),
        [
            (4.375, 50, "21.875 stages of 10 bits; give a multiple of 0.2 up to 12.8"),
            (0.5, 4, "0.2 stages of 10 bits"),
            (16, 128, "204.8 stages of 10 bits"),
        ],
    )
    def test_rates_that_the_dim_cannot_give(self, rate: float, dim: int, message: str) -> None:
        with pytest.raises(SchemeError, match=message):
            ResidualConfig(rate=rate, code_bits=10).stages(dim)

    @pytest.mark.parametrize("given", [{}, {"depth": 2, "rate": 1.0}])
    def test_depth_or_rate(self, given: dict[str, float]) -> None:
        with pytest.raises(ValueError, match="either `depth`, in stages, or `rate`"):
            ResidualConfig(code_bits=4, **given)  # type: ignore[arg-type]


def test_a_wrong_shape_is_refused_with_a_search_too() -> None:
    quantizer = ResidualQuantizer(depth=2, code_bits=2, beam=2)
    quantizer.fit(torch.randn(20, 1, 4))
    with pytest.raises(StateError, match=r"vectors have shape \[N, 1, 4\]"):
        quantizer.encode(torch.randn(3, 1, 5))
