"""What holds for every quantizer and any data."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqkv.codebooks.kmeans import KMeans, KMeansConfig
from vqkv.codebooks.uniform import UniformConfig
from vqkv.kernels import KERNELS, Selection, select, using
from vqkv.layouts import Layout
from vqkv.quantizers import Quantizer
from vqkv.quantizers.identity import IdentityQuantizer
from vqkv.quantizers.product import ProductQuantizer
from vqkv.quantizers.residual import ResidualQuantizer

FAST = KMeansConfig(iterations=3)
seeds = st.integers(0, 10**6)


def vectors(seed: int, count: int = 128, subspaces: int = 2, dim: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(subspaces, dim, generator=generator) * 3 + 0.1
    return scales * torch.randn(count, subspaces, dim, generator=generator)


def squared_distances(x: torch.Tensor, codewords: torch.Tensor) -> torch.Tensor:
    """`[N, M, K]` in fp64, of `[N, M, d]` to `[M, K, d]`."""
    return (x.double().unsqueeze(2) - codewords.double()).square().sum(-1)


def slack(x: torch.Tensor, codewords: torch.Tensor) -> float:
    """By how much fp32 may mistake a squared distance."""
    return 1e-5 * float(
        x.double().square().sum(-1).max() + codewords.double().square().sum(-1).max()
    )


@settings(max_examples=40, deadline=None)
@given(seed=seeds, dim=st.integers(1, 9), bits=st.integers(0, 6))
def test_product_codes_are_the_nearest_codewords(seed: int, dim: int, bits: int) -> None:
    x = vectors(seed, dim=dim)
    quantizer = ProductQuantizer(code_bits=bits, learner=FAST)
    quantizer.fit(x, seed=seed)
    fresh = vectors(seed + 1, dim=dim)
    codes = quantizer.encode(fresh)
    assert codes.shape == (128, 2, 1)
    assert codes.dtype == torch.int32
    books = quantizer.codewords_[:, 0]
    distances = squared_distances(fresh, books)
    chosen = distances.gather(2, codes.long())[..., 0]
    assert bool((chosen <= distances.amin(-1) + slack(fresh, books)).all())
    looked_up = books[torch.arange(2), codes[..., 0].long()].float()
    assert torch.equal(quantizer.decode(codes), looked_up)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, dim=st.integers(1, 6), bits=st.integers(0, 6))
def test_codewords_come_back_exactly(seed: int, dim: int, bits: int) -> None:
    quantizer = ProductQuantizer(code_bits=bits, learner=FAST)
    quantizer.fit(vectors(seed, dim=dim))
    books = quantizer.codewords_[:, 0].float().transpose(0, 1).contiguous()  # [K, M, d]
    assert torch.equal(quantizer.decode(quantizer.encode(books)), books)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, bits=st.integers(1, 4))
def test_error_on_fitting_data_never_grows_with_stages(seed: int, bits: int) -> None:
    """Each stage of means beats the zero vector; only rounding codewords to fp16 may cost a bit."""
    x = vectors(seed)
    errors = []
    for depth in (1, 2, 3, 4):
        quantizer = ResidualQuantizer(depth=depth, code_bits=bits, learner=FAST)
        quantizer.fit(x, seed=seed)
        restored = quantizer.decode(quantizer.encode(x))
        errors.append(float((x - restored).double().square().sum(-1).mean()))
    rounding = 2e-3 * float(x.square().sum(-1).mean())
    assert all(after <= before + rounding for before, after in pairwise(errors))


@settings(max_examples=25, deadline=None)
@given(seed=seeds, dim=st.integers(1, 5))
def test_error_on_fitting_data_never_grows_with_bits_from_nested_starts(
    seed: int, dim: int
) -> None:
    """From the smaller codebook and as many samples more. From unrelated starts it could grow."""
    x = vectors(seed, dim=dim)
    books = KMeans(iterations=3).fit(x, 1, seed=seed)
    errors = [books.health_[0].inertia[-1]]
    for bits in range(1, 6):
        start = torch.cat([books.codewords_[:, 0], x[: 2 ** (bits - 1)].transpose(0, 1)], 1)
        books = KMeans(iterations=3).fit(x, 2**bits, init=start)
        errors.append(books.health_[0].inertia[-1])
    rounding = 1e-6 * float(x.square().sum(-1).mean())
    assert all(after <= before + rounding for before, after in pairwise(errors))


@settings(max_examples=8, deadline=None)
@given(seed=seeds, case=st.sampled_from([(1, 1), (1, 3), (2, 4), (4, 4), (4, 8), (8, 6)]))
def test_held_out_gaussian_error_never_beats_the_shannon_bound(
    seed: int, case: tuple[int, int]
) -> None:
    """`D(R) = σ² 2^(−2R)`; 32k scalars of held-out data scatter by about 1 %."""
    dim, bits = case
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1024, 1, dim, generator=generator)
    held_out = torch.randn(32768 // dim, 1, dim, generator=generator)
    for quantizer in (
        ProductQuantizer(code_bits=bits),
        ResidualQuantizer(depth=2, code_bits=bits, learner=FAST),
    ):
        quantizer.fit(x, seed=seed)
        rate = bits * quantizer.config.stages(dim) / dim
        error = float((held_out - quantizer.decode(quantizer.encode(held_out))).square().mean())
        assert error > 0.95 * 2 ** (-2 * rate)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, bits=st.integers(0, 8), width=st.floats(0.01, 100))
def test_uniform_scalar_error_is_at_most_half_a_step(seed: int, bits: int, width: float) -> None:
    quantizer = ProductQuantizer(code_bits=bits, learner=UniformConfig(low=-width, high=width))
    quantizer.prepare(3, 1)
    x = width * (2 * torch.rand(64, 3, 1, generator=torch.Generator().manual_seed(seed)) - 1)
    error = (x - quantizer.decode(quantizer.encode(x))).abs().max()
    half = width / 2**bits
    fp16 = width * 2**-11 + 2**-25  # levels are rounded to fp16
    assert float(error) <= half + fp16 + 1e-6 * width


def make(kind: str) -> Quantizer:
    if kind == "identity":
        return IdentityQuantizer()
    if kind == "residual":
        return ResidualQuantizer(depth=3, code_bits=4, learner=FAST)
    return ProductQuantizer(code_bits=5, learner=FAST)


@pytest.mark.parametrize("kind", ["identity", "product", "residual"])
@settings(max_examples=15, deadline=None)
@given(seed=seeds, rows=st.integers(1, 70))
def test_encode_commutes_with_permuting_vectors(kind: str, seed: int, rows: int) -> None:
    quantizer = make(kind).fit(vectors(seed))
    x = vectors(seed + 1, count=rows)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    codes = quantizer.encode(x)
    permuted = quantizer.encode(x[order])
    errors = (x - quantizer.decode(codes)).square().sum(-1)
    permuted_errors = (x[order] - quantizer.decode(permuted)).square().sum(-1)
    # Blocked products may round near-ties apart, so codes may differ where errors do not.
    differ = (codes[order] != permuted).any(-1)
    torch.testing.assert_close(errors[order][differ], permuted_errors[differ], rtol=1e-4, atol=1e-4)
    assert differ.float().mean() < 0.02


@pytest.mark.parametrize("kind", ["identity", "product", "residual"])
def test_state_round_trips(kind: str) -> None:
    x = vectors(0)
    quantizer = make(kind).fit(x)
    loaded = make(kind)
    loaded.load_state({name: tensor.clone() for name, tensor in quantizer.state().items()})
    assert torch.equal(loaded.encode(x), quantizer.encode(x))
    assert torch.equal(loaded.decode(loaded.encode(x)), quantizer.decode(quantizer.encode(x)))


@pytest.mark.parametrize("kind", ["product", "residual"])
def test_same_seed_same_codebooks(kind: str) -> None:
    first, again, other = (make(kind).fit(vectors(0), seed=s).state() for s in (1, 1, 2))
    assert torch.equal(first["codewords"], again["codewords"])
    assert not torch.equal(first["codewords"], other["codewords"])


def encoders() -> list[str]:
    """Kernels that encode on a CPU here."""
    layout = Layout.of_codebook(2, 3, 16, 4)
    able = []
    for name in KERNELS.names():
        op, _, kernel = name.partition(".")
        if op == "encode" and KERNELS.get(name).refuses(layout, torch.device("cpu")) is None:
            able.append(kernel)
    return able


@pytest.mark.parametrize("kernel", encoders())
@settings(max_examples=15, deadline=None)
@given(seed=seeds, dim=st.sampled_from([1, 2, 3, 4, 8, 32]), bits=st.integers(1, 7))
def test_kernels_choose_the_same_codes_up_to_near_ties(
    kernel: str, seed: int, dim: int, bits: int
) -> None:
    x = vectors(seed, count=200, dim=dim)
    quantizer = ProductQuantizer(code_bits=bits, learner=FAST)
    quantizer.fit(x)
    with using(encode="naive"):
        expected = quantizer.encode(x)
    with using(encode=kernel):
        codes = quantizer.encode(x)
    distances = squared_distances(x, quantizer.codewords_[:, 0])
    lost = distances.gather(2, codes.long()) - distances.gather(2, expected.long())
    # How many differ is not bounded: 128 codewords on a line have many near ties.
    assert float(lost.abs().max()) <= slack(x, quantizer.codewords_[:, 0])


def test_a_kernel_was_chosen_for_encoding() -> None:
    chosen: Selection = select("encode", Layout.of_codebook(2, 3, 16, 4), torch.device("cpu"))
    assert chosen.kernel.name in encoders()
