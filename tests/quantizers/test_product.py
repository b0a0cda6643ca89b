from __future__ import annotations

import pytest
import torch

from vqkv.codebooks.kmeans import KMeansConfig
from vqkv.codebooks.product import ProductLearnerConfig
from vqkv.codebooks.uniform import UniformConfig
from vqkv.errors import NotFittedError, SchemeError, StateError
from vqkv.quantizers.product import ProductConfig, ProductQuantizer


def samples(count: int = 200) -> torch.Tensor:
    return torch.randn(count, 3, 4, generator=torch.Generator().manual_seed(0))


def test_zero_bits_keep_the_mean() -> None:
    x = samples()
    quantizer = ProductQuantizer(code_bits=0)
    quantizer.fit(x)
    codes = quantizer.encode(x)
    assert torch.equal(codes, torch.zeros(200, 3, 1, dtype=torch.int32))
    torch.testing.assert_close(quantizer.decode(codes)[7], x.mean(0), rtol=1e-3, atol=1e-4)


def test_weights_move_codewords() -> None:
    x = samples()
    quantizer = ProductQuantizer(code_bits=0)
    weights = torch.zeros(200)
    weights[5] = 2.0
    quantizer.fit(x, weights)
    torch.testing.assert_close(quantizer.codewords_[:, 0, 0].float(), x[5], rtol=1e-3, atol=1e-4)


def test_encoding_compares_what_decoding_returns() -> None:
    quantizer = ProductQuantizer(code_bits=4)
    quantizer.fit(samples())
    assert quantizer.codewords_.dtype == torch.float16
    assert quantizer.state()["codewords"].shape == (3, 1, 16, 4)


@pytest.mark.parametrize(
    ("learner", "free"),
    [
        (KMeansConfig(), False),
        (UniformConfig(), False),
        (UniformConfig(low=-1, high=1), True),
        (ProductLearnerConfig(learners=(UniformConfig(low=0, high=1),) * 2), True),
    ],
)
def test_data_free(learner: object, free: bool) -> None:
    config = ProductConfig.model_validate({"code_bits": 2, "learner": learner})
    assert config.data_free is free


def test_a_grid_needs_no_fit() -> None:
    quantizer = ProductQuantizer(code_bits=1, learner=UniformConfig(low=-2, high=2))
    quantizer.prepare(3, 1)
    x = torch.tensor([-0.1, 0.1, 9.0]).view(1, 3, 1)
    assert quantizer.encode(x).flatten().tolist() == [0, 1, 1]
    assert quantizer.decode(quantizer.encode(x)).flatten().tolist() == [-1.0, 1.0, 1.0]


def test_a_grid_for_other_subspaces() -> None:
    runs = ProductLearnerConfig(learners=(UniformConfig(low=0, high=1),) * 2)
    with pytest.raises(
        StateError, match="'product' has fixed codewords for 2 subspaces, needed are 3"
    ):
        ProductQuantizer(code_bits=1, learner=runs).prepare(3, 1)


def test_before_fit() -> None:
    quantizer = ProductQuantizer(code_bits=4)
    for use in (
        lambda: quantizer.encode(samples()),
        lambda: quantizer.decode(torch.zeros(1, 3, 1, dtype=torch.int32)),
        quantizer.state,
        lambda: quantizer.prepare(3, 4),
    ):
        with pytest.raises(NotFittedError, match=r"ProductQuantizer has not been fitted.*call fit"):
            use()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(9, 4), r"samples have shape \[N, M, d\], given \[9, 4\]"),
        (torch.zeros(9, 1, 4), "16 codewords need at least as many samples, given 9"),
        (torch.full((99, 1, 4), float("nan")), r"samples \[N, M, d\] hold nan at \[0, 0, 0\]"),
        (torch.full((99, 1, 4), float("inf")), r"samples \[N, M, d\] hold inf at \[0, 0, 0\]"),
        (torch.full((99, 1, 4), 1e5), r"codewords reach 1e\+05, beyond fp16's 65504: scale"),
    ],
)
def test_bad_samples(x: torch.Tensor, message: str) -> None:
    with pytest.raises(StateError, match=message):
        ProductQuantizer(code_bits=4).fit(x)


def test_wrong_shapes() -> None:
    quantizer = ProductQuantizer(code_bits=4)
    quantizer.fit(samples())
    with pytest.raises(StateError, match=r"vectors have shape \[N, 3, 4\], given \[5, 3, 2\]"):
        quantizer.encode(torch.zeros(5, 3, 2))
    with pytest.raises(StateError, match=r"codes have shape \[N, 3, 1\], given \[5, 3, 2\]"):
        quantizer.decode(torch.zeros(5, 3, 2, dtype=torch.int32))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r"state holds 'codewords' alone, given \[\]"),
        (
            {"codewords": torch.zeros(3, 1, 16, 4)},
            r"codewords are float16 \[M, S, K, d\], given torch.float32 \[3, 1, 16, 4\]",
        ),
        (
            {"codewords": torch.zeros(3, 1, 8, 4, dtype=torch.float16)},
            r"codewords have S, K = \(1, 16\), given \(1, 8\)",
        ),
    ],
)
def test_state_that_does_not_fit(state: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(StateError, match=message):
        ProductQuantizer(code_bits=4).load_state(state)


def test_bits_out_of_range() -> None:
    with pytest.raises(SchemeError, match="code_bits"):
        ProductQuantizer(code_bits=17)
