"""The compiled kernels against brute force in fp64, at every SIMD level of this CPU."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from pathlib import Path

import pytest
import torch

from tests.kernels.coded_cases import Case, problem
from vqkv.errors import KernelError, StateError
from vqkv.kernels import native
from vqkv.kernels.native.attend import Prepared
from vqkv.kernels.native.decode import decode
from vqkv.kernels.native.library import check_sources, library
from vqkv.kernels.native.trellis import encode_trellis

pytestmark = pytest.mark.skipif(
    not native.available(), reason="the package was built without a C compiler"
)


def squared_distances(x: torch.Tensor, codewords: torch.Tensor) -> torch.Tensor:
    """`[N, M, K]` in fp64."""
    return (x.double().unsqueeze(2) - codewords.double().unsqueeze(0)).square().sum(-1)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 8, 16, 32, 33])
@pytest.mark.parametrize("size", [1, 2, 3, 16, 255, 300])
def test_codes_are_nearest(level: native.Level, dim: int, size: int) -> None:
    for vectors, subspaces in ((1, 1), (7, 3), (64, 1), (129, 2)):
        x, codewords = random(vectors, subspaces, dim), random(subspaces, size, dim, seed=1)
        codes = native.nearest(x, codewords)
        assert codes.shape == (vectors, subspaces)
        distances = squared_distances(x, codewords)
        found = distances.gather(2, codes.long().unsqueeze(-1))[..., 0]
        # Near-ties may fall either way: fp32 rounds scores by about d · 6e-8.
        assert (found - distances.amin(2)).max() < 1e-5 * dim


def test_rows_are_split_over_threads_without_loss(level: native.Level) -> None:
    x, codewords = random(1500, 3, 4), random(3, 64, 4, seed=1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        codes = native.nearest(x, codewords)
        torch.set_num_threads(1)
        assert torch.equal(native.nearest(x, codewords), codes)
    finally:
        torch.set_num_threads(threads)


def nearest_in_child(x: torch.Tensor, codewords: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(native.nearest(x, codewords), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_has_threads_of_its_own() -> None:
    x, codewords = random(1500, 3, 4), random(3, 64, 4, seed=1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        expected = native.nearest(x, codewords)
        with warnings.catch_warnings():  # Python warns of forking with threads, which is the point
            warnings.simplefilter("ignore", DeprecationWarning)
            child = multiprocessing.get_context("fork").Process(
                target=nearest_in_child, args=(x, codewords, expected)
            )
            child.start()
        child.join(timeout=60)
        child.kill()
        child.join()
        assert child.exitcode == 0
    finally:
        torch.set_num_threads(threads)


def test_the_lowest_code_wins_ties(level: native.Level) -> None:
    x = random(70, 2, 4)
    codewords = random(2, 1, 4, seed=1).expand(2, 9, 4).contiguous()
    assert not native.nearest(x, codewords).any()


def test_strided_input(level: native.Level) -> None:
    x = random(4, 130, 3).permute(1, 2, 0)  # [N, M, d], not contiguous
    codewords = random(4, 20, 3, seed=1).permute(2, 1, 0)
    expected = squared_distances(x, codewords).argmin(2)
    assert torch.equal(native.nearest(x, codewords).long(), expected)


def test_no_vectors(level: native.Level) -> None:
    codewords = random(3, 8, 4)
    assert native.nearest(torch.zeros(0, 3, 4), codewords).shape == (0, 3)
    found = native.assign_accumulate(torch.zeros(0, 3, 4), codewords)
    assert not found.counts.any()
    assert found.sums.shape == (3, 8, 4)


def test_nan_gets_a_code_in_range(level: native.Level) -> None:
    x = random(40, 2, 8)
    x[5, 1, 3] = float("nan")
    codes = native.nearest(x, random(2, 30, 8, seed=1))
    assert codes.min() >= 0
    assert codes.max() < 30


@pytest.mark.parametrize("weighting", ["none", "by vector", "by vector and subspace"])
@pytest.mark.parametrize("vectors", [9, 1000])
def test_statistics(level: native.Level, weighting: str, vectors: int) -> None:
    x, codewords = random(vectors, 3, 5), random(3, 17, 5, seed=1)
    generator = torch.Generator().manual_seed(2)
    weights = {
        "none": None,
        "by vector": torch.rand(vectors, generator=generator),
        "by vector and subspace": torch.rand(vectors, 3, generator=generator),
    }[weighting]
    found = native.assign_accumulate(x, codewords, weights)
    assert torch.equal(found.codes, native.nearest(x, codewords))
    full = torch.ones(vectors, 3) if weights is None else weights.view(vectors, -1).expand(-1, 3)
    chosen = torch.nn.functional.one_hot(found.codes.long(), 17).double() * full.unsqueeze(-1)
    torch.testing.assert_close(found.counts, chosen.sum(0))
    torch.testing.assert_close(found.sums, torch.einsum("nmk,nmd->mkd", chosen, x.double()))
    inertia = (chosen * squared_distances(x, codewords)).sum((0, 2))
    torch.testing.assert_close(found.inertia, inertia)


@pytest.mark.parametrize(
    ("x", "codewords", "message"),
    [
        (torch.zeros(2, 3, 4).double(), torch.zeros(3, 5, 4), "x is float32"),
        (torch.zeros(2, 3, 4), torch.zeros(3, 5, 4).half(), "codewords is float32"),
        (torch.zeros(2, 3), torch.zeros(3, 5, 4), "agree in M and d"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 5, 4), r"\[2, 3, 4\] and \[2, 5, 4\]"),
        (torch.zeros(2, 3, 4), torch.zeros(3, 5, 3), "agree in M and d"),
        (torch.zeros(2, 3, 4), torch.zeros(3, 0, 4), "K is positive"),
    ],
)
def test_wrong_input(x: torch.Tensor, codewords: torch.Tensor, message: str) -> None:
    with pytest.raises(StateError, match=message):
        native.nearest(x, codewords)


def test_torchs_default_type_and_device_do_not_matter() -> None:
    x, words, table = random(100, 3, 4), random(3, 2, 16, 4, seed=1), random(16, 2, seed=2)
    pairs, cost = random(9, 3, 2), torch.ones(3, 2)
    codes, (query, coded) = torch.randint(16, (100, 3, 2)), problem(Case())

    def found() -> tuple[torch.Tensor, ...]:
        paths = encode_trellis(pairs, cost, table, [2, 1, 2])
        return (
            *(native.nearest(x, words[:, 0]), paths, decode(codes, words)),
            *Prepared(coded)(query)[:2],
        )

    expected = found()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            given = found()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(given, expected, atol=0, rtol=0)


def test_a_library_of_other_sources_is_refused(tmp_path: Path) -> None:
    check_sources(library(), tmp_path)  # as in a wheel, which has none
    (tmp_path / "levels.c").write_text("/* newer */\n")
    with pytest.raises(KernelError, match="pip install -e"):
        check_sources(library(), tmp_path)
