"""Codes chosen together: the compiled kernel against the naive one, both against brute force."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from vqkv.errors import KernelError, StateError
from vqkv.kernels.decode import decode
from vqkv.kernels.encode.joint import SLACK, Coupling, JointLayout, coupling, encode_joint
from vqkv.kernels.select import KERNELS as KERNELS_THERE
from vqkv.kernels.select import recording, select, using
from vqkv.layouts import Layout

KERNELS = [
    name
    for name in ("naive", "cpu", "triton")
    if KERNELS_THERE.get(f"encode_joint.{name}").refuses(
        JointLayout(Layout.of_codebook(3, 1, 16, 5), 1), torch.device("cpu")
    )
    is None
]
#: Those that keep several choices where they are asked to.
SEARCHING = [name for name in KERNELS if name != "triton"]
#: N, U, groups, K, d
SHAPES = [
    (1, 1, 2, 3, 1),
    (131, 3, 4, 33, 4),
    (99, 1, 32, 64, 4),
    (70, 2, 5, 16, 3),
    (40, 1, 3, 16, 5),
    (17, 2, 4, 256, 8),
    (0, 1, 2, 3, 1),
]


def case(
    rows: int, units: int, groups: int, size: int, dim: int
) -> tuple[torch.Tensor, torch.Tensor, Coupling]:
    """Vectors, codewords, and a metric whose blocks of one group are unit ones."""
    generator = torch.Generator().manual_seed(rows + size)
    x = torch.randn(rows, units * groups, dim, generator=generator)
    words = torch.randn(units * groups, 1, size, dim, generator=generator)
    channels = groups * dim
    noise = torch.randn(units, channels, channels, generator=generator)
    # Little enough that the metric is positive definite.
    spread = torch.eye(channels) + 0.25 * (noise + noise.mT) / channels**0.5
    own = torch.arange(channels) // dim
    metric = torch.where(own[:, None] == own, torch.eye(channels), spread)
    return x, words, coupling(metric, dim)


def cost(x: torch.Tensor, words: torch.Tensor, coupled: Coupling, codes: torch.Tensor) -> float:
    error = (decode(codes, words) - x).view(len(x), *coupled.metric.shape[:2])
    return float(torch.einsum("nui,uij,nuj->", error, coupled.metric, error))


def assert_as_good(
    given: tuple[Any, Any, Any], expected: torch.Tensor, found: torch.Tensor
) -> None:
    """The same codes of nearly all units: near ties are there, and later codes follow from them."""
    assert found.shape == expected.shape and found.dtype == torch.int32
    units = len(given[2].metric)
    differ = (expected != found).unflatten(1, (units, found.shape[1] // units)).flatten(2).any(2)
    assert differ.sum() <= 1 + 0.05 * differ.numel()
    assert cost(*given, found) == pytest.approx(cost(*given, expected), rel=2e-3)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "naive"])
def test_kernels_agree_but_for_near_ties(kernel: str, shape: tuple[int, ...], scale: float) -> None:
    x, words, metric = case(*shape)
    given = (scale * x, scale * words, metric)
    with using(encode_joint="naive", encode="naive"):
        expected = encode_joint(*given, sweeps=3)
    with using(encode_joint=kernel), recording() as ran:
        found = encode_joint(*given, sweeps=3)
    assert ran == [f"encode_joint.{kernel}"]
    assert_as_good(given, expected, found)


@pytest.mark.parametrize("size, dim", [(192, 8), (48, 24), (40, 10)])
@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "naive"])
def test_padding_is_no_codeword(kernel: str, size: int, dim: int) -> None:
    """Though it is nearest to short vectors."""
    x, words, coupled = case(40, 2, 3, size, dim)
    given = (0.1 * x, words, coupled)
    with using(encode_joint="naive", encode="naive"):
        expected = encode_joint(*given, sweeps=2)
    with using(encode_joint=kernel):
        assert_as_good(given, expected, encode_joint(*given, sweeps=2))


@pytest.mark.skipif("cpu" not in KERNELS, reason="no C compiler")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("level")
def test_every_level_agrees(shape: tuple[int, ...]) -> None:
    given = case(*shape)
    with using(encode_joint="naive", encode="naive"):
        expected = encode_joint(*given, sweeps=2)
    with using(encode_joint="cpu"):
        assert_as_good(given, expected, encode_joint(*given, sweeps=2))


@pytest.mark.parametrize("kernel", KERNELS)
def test_more_sweeps_cost_no_more(kernel: str) -> None:
    given = case(200, 2, 4, 16, 2)
    with using(encode_joint=kernel):
        costs = [cost(*given, encode_joint(*given, sweeps=sweeps)) for sweeps in (1, 2, 4)]
    assert costs[0] > costs[1] > 0 and costs[2] <= costs[1]


@pytest.mark.skipif("cpu" not in KERNELS, reason="no C compiler")
@pytest.mark.parametrize("width", [2, 5, 40])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("level")
def test_wider_searches_agree_but_for_near_ties(shape: tuple[int, ...], width: int) -> None:
    given = case(*shape)
    with using(encode_joint="naive", encode="naive"):
        expected = encode_joint(*given, sweeps=1, width=width)
    with using(encode_joint="cpu"):
        assert_as_good(given, expected, encode_joint(*given, sweeps=1, width=width))


def test_looking_ahead_is_the_least_that_the_rest_can_leave() -> None:
    coupled = case(1, 1, 4, 3, 2)[2]
    metric = coupled.metric[0].double() + SLACK * torch.eye(8)
    error = torch.randn(8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for known in range(2, 9, 2):
        best = error.clone()
        rest, so_far = slice(known, 8), slice(0, known)
        best[rest] = -torch.linalg.solve(metric[rest, rest], metric[rest, so_far] @ error[so_far])
        pushed = coupled.ahead[0].double().mT @ error
        assert float(best @ metric @ best) == pytest.approx(
            float(pushed[so_far].square().sum()), rel=1e-5
        )


@pytest.mark.parametrize("kernel", KERNELS)
def test_looking_ahead_costs_less_than_sweeps_alone(kernel: str) -> None:
    x, words, _ = case(500, 1, 16, 256, 1)
    # Errors cost what they add up to in three directions, and little else.
    directions = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    metric = directions @ directions.mT + 0.3 * torch.eye(16)
    scale = metric.diagonal().rsqrt()
    coupled = coupling((scale[:, None] * metric * scale).unsqueeze(0), 1)
    blind = coupled._replace(ahead=torch.eye(16).unsqueeze(0))
    with using(encode_joint=kernel):
        sweeps_alone = encode_joint(x, words, blind, sweeps=3)
        found = encode_joint(x, words, coupled, sweeps=2)
    assert cost(x, words, coupled, found) < 0.95 * cost(x, words, coupled, sweeps_alone)


def test_a_metric_in_which_errors_pay_is_refused() -> None:
    metric = torch.eye(4).expand(2, 4, 4).clone()
    metric[1, 0, 2] = metric[1, 2, 0] = 1.7
    with pytest.raises(StateError, match=r"not positive definite: its least eigenvalue is -0\.7"):
        coupling(metric, 2)


def test_a_metric_that_rounding_made_a_little_negative_is_raised() -> None:
    metric = torch.eye(4)
    metric[0, 2] = metric[2, 0] = 1.2
    ahead = coupling(metric[None], 2).ahead[0]
    torch.testing.assert_close(ahead @ ahead.T, metric + (SLACK + 0.2) * torch.eye(4))


@pytest.mark.parametrize("kernel", SEARCHING)
def test_wider_searches_cost_less(kernel: str) -> None:
    given = case(200, 2, 8, 16, 2)
    with using(encode_joint=kernel):
        costs = [cost(*given, encode_joint(*given, sweeps=3, width=width)) for width in (1, 4, 32)]
    assert costs[0] > costs[1] > costs[2]


@pytest.mark.parametrize("kernel", SEARCHING)
def test_a_search_that_keeps_everything_finds_the_best(kernel: str) -> None:
    x, words, coupled = case(5, 1, 3, 4, 2)
    with using(encode_joint=kernel):
        codes = encode_joint(x, words, coupled, sweeps=1, width=64)
    for row in range(5):
        tried = [
            cost(
                x[row : row + 1],
                words,
                coupled,
                torch.tensor(codes, dtype=torch.int32).view(1, 3, 1),
            )
            for codes in product(range(4), repeat=3)
        ]
        mine = cost(x[row : row + 1], words, coupled, codes[row : row + 1])
        assert mine == pytest.approx(min(tried), rel=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_vectors_far_away_get_some_code(kernel: str) -> None:
    x, words, coupled = case(20, 1, 4, 7, 2)
    with using(encode_joint=kernel):
        codes = encode_joint(1e9 * x, words, coupled, sweeps=2)
    assert ((codes >= 0) & (codes < 7)).all()


@pytest.mark.parametrize("kernel", SEARCHING)
def test_states_that_are_no_numbers_get_some_code(kernel: str) -> None:
    x, words, coupled = case(3, 1, 2, 4, 2)
    with using(encode_joint=kernel):
        codes = encode_joint(torch.full_like(x, torch.nan), words, coupled, sweeps=1, width=3)
    assert ((codes >= 0) & (codes < 4)).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_of_two_groups_the_second_is_best_given_the_first(kernel: str) -> None:
    x, words, coupled = case(1, 1, 2, 4, 2)
    with using(encode_joint=kernel):
        codes = encode_joint(x, words, coupled, sweeps=1)
    tried = {
        pair: cost(x, words, coupled, torch.tensor(pair, dtype=torch.int32).view(1, 2, 1))
        for pair in product(range(4), repeat=2)
    }
    first, second = codes.flatten().tolist()
    assert tried[first, second] == min(tried[first, k] for k in range(4))


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, words, coupled = case(3, 1, 2, 4, 2)
    with pytest.raises(StateError, match=r"metric \[U, n, n\] with n = M d / U"):
        encode_joint(x, words, coupled._replace(metric=coupled.metric[:, 1:]), sweeps=1)
    with pytest.raises(StateError, match=r"metric \[U, n, n\] with n = M d / U"):
        encode_joint(x, words, coupled._replace(ahead=coupled.ahead[:, :2]), sweeps=1)


@pytest.mark.skipif("triton" not in KERNELS, reason="Triton is not installed")
def test_more_choices_are_refused() -> None:
    with using(encode_joint="triton"), pytest.raises(KernelError, match="keeps 2 choices"):
        encode_joint(*case(1, 1, 2, 3, 1), sweeps=1, width=2)


@pytest.mark.skipif("triton" not in KERNELS, reason="Triton is not installed")
@pytest.mark.parametrize(
    "shape, reason",
    [((1, 1, 2, 257, 2), "codes of 9 bits, up to 8"), ((1, 1, 66, 2, 4), "264 channels of a unit")],
)
def test_what_does_not_fit_into_registers_is_refused(shape: tuple[int, ...], reason: str) -> None:
    with using(encode_joint="triton"), pytest.raises(KernelError, match=reason):
        encode_joint(*case(*shape), sweeps=1)


@pytest.mark.skipif("triton" not in KERNELS, reason="Triton is not installed")
def test_it_compiles_as_one_graph() -> None:
    given = case(5, 2, 3, 16, 2)
    with using(encode_joint="triton"):
        layout = JointLayout(Layout.of_codebook(6, 1, 16, 2, units=2), width=1)
        run = select("encode_joint", layout, "cpu").kernel.run
    compiled = torch.compile(
        lambda x, words, *pair: run(x, words, Coupling(*pair), 2, 1) + 1,
        backend="aot_eager",
        fullgraph=True,
    )
    assert torch.equal(compiled(*given[:2], *given[2]), run(*given, 2, 1) + 1)
