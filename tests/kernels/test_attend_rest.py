"""What follows attention on codes: exact attention over both, and the compiled kernel's."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from vqkv.errors import KernelError
from vqkv.kernels import gpu, native, recording, select, using
from vqkv.kernels.attend.codes import Partial
from vqkv.kernels.attend.rest import Rest, attend_rest

NATIVE = pytest.mark.skipif(
    not native.available(), reason="the package was built without a C compiler"
)
NO_TRITON = gpu.unavailable_reason(torch.device("cpu"))
TRITON = pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))


class Case(NamedTuple):
    batch: int = 1
    heads: int = 2
    group: int = 3
    length: int = 1
    head_dim: int = 64
    tokens: tuple[int, int] = (4, 130)
    predicts: bool = False
    bias: bool = True
    masked: str = ""  # by "query", or by "head" and query
    dtype: torch.dtype = torch.float32
    others: torch.dtype | None = None  # of all but the keys of the tail
    null: bool = False


CASES = [
    Case(),
    Case(predicts=True),
    Case(predicts=True, dtype=torch.bfloat16, head_dim=128, group=4),
    Case(batch=3, masked="query", predicts=True, tokens=(2, 1)),
    Case(
        batch=2, length=5, group=4, masked="head", bias=False
    ),  # more rows than a vector has lanes
    Case(length=16, group=2, heads=1, tokens=(3, 65), dtype=torch.bfloat16, masked="head"),
    Case(head_dim=20, group=1, tokens=(0, 1), bias=False),
    Case(tokens=(0, 0)),
    Case(head_dim=33, tokens=(5, 7), predicts=True),
    Case(batch=0),
    Case(null=True),
    Case(batch=2, length=5, group=4, masked="head", null=True, dtype=torch.bfloat16),
    # As under autocast, and after a cache changed its model's type.
    Case(dtype=torch.float32, others=torch.bfloat16),
    Case(dtype=torch.float16, others=torch.float32),
]
#: Of a type that the compiled kernel does not read.
HALVES = [
    Case(dtype=torch.float16, predicts=True),
    Case(dtype=torch.float16, head_dim=80, group=17, predicts=True, masked="query"),
]


def problem(case: Case) -> tuple[torch.Tensor, Partial, Rest]:
    """States are parts of more tokens, with channels side by side or not."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    batch, heads, _, length, head_dim, tokens, *_ = case
    queries = heads * case.group

    def states(count: int, order: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        sizes = {"b": batch, "h": heads, "t": count + 3, "d": head_dim}
        kept = random(*(sizes[axis] for axis in order)).to(dtype or case.others or case.dtype)
        return kept.permute(*map(order.index, "bhtd"))[:, :, 2 : 2 + count]

    rows = (batch, queries, length)
    partial = Partial(
        random(*rows, head_dim),
        random(*rows) + 3,
        random(*rows, head_dim) if case.predicts else None,
    )
    hidden = None
    if case.masked:
        hidden = random(batch, queries if case.masked == "head" else 1, length, sum(tokens)) > 0.5
        # A row without coded tokens, whose last query sees no exact one either.
        partial.lse[0], partial.output[0] = -torch.inf, 0.0
        hidden[0, :, 1:][:, -1:] = True
    rest = Rest(
        random(heads, (1 + case.predicts) * head_dim, head_dim) / head_dim**0.5,
        random(heads, head_dim) if case.bias else None,
        sinks=(states(tokens[0], "bhtd"), states(tokens[0], "bthd")),
        tail=(states(tokens[1], "bthd", case.dtype), states(tokens[1], "bhdt")),
        hidden=hidden,
        null_scores=2 * random(queries) + 5 if case.null else None,
    )
    return random(*rows, head_dim) * head_dim**-0.5, partial, rest


def truth(query: torch.Tensor, partial: Partial, rest: Rest) -> torch.Tensor:
    """By parts in fp64: each of coded and exact tokens has an output and a log-sum-exp."""
    group = query.shape[1] // len(rest.output_map)

    def by_query(x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        return x.double().repeat_interleave(group, dim)

    means = partial.output
    if partial.key_mean is not None:
        means = torch.cat([means, partial.key_mean], 3)
    coded = means.double() @ by_query(rest.output_map, 0)
    if rest.output_bias is not None:
        coded += by_query(rest.output_bias, 0)[:, None]
    keys, values = (
        by_query(torch.cat(each, 2)) for each in zip(rest.sinks, rest.tail, strict=True)
    )
    scores = query.double() @ keys.mT
    if rest.hidden is not None:
        scores = scores.masked_fill(rest.hidden, -torch.inf)
    share = torch.exp(partial.lse.double().unsqueeze(3))
    weights = torch.exp(scores)
    total = share + weights.sum(3, keepdim=True)
    if rest.null_scores is not None:
        total += rest.null_scores.double().exp()[:, None, None]
    return ((share * coded + weights @ values) / total).nan_to_num(0.0)  # nothing seen: 0 / 0


@pytest.mark.parametrize("case", CASES + HALVES, ids=str)
@pytest.mark.parametrize("kernel", ["naive", pytest.param("triton", marks=TRITON)])
def test_one_softmax_over_coded_and_exact_tokens(case: Case, kernel: str) -> None:
    query, partial, rest = problem(case)
    with using(attend_rest=kernel), recording() as ran:
        found = attend_rest(query, partial, rest)
    assert ran == [f"attend_rest.{kernel}"]
    assert found.dtype == torch.float32 and found.shape == query.shape
    torch.testing.assert_close(found.double(), truth(query, partial, rest), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
@NATIVE
@pytest.mark.usefixtures("level")
def test_the_compiled_kernel_does_the_same(case: Case) -> None:
    query, partial, rest = problem(case)
    with recording() as ran:
        found = attend_rest(query, partial, rest)
    assert ran == ["attend_rest.cpu"]
    assert found.dtype == torch.float32 and found.shape == query.shape
    torch.testing.assert_close(found.double(), truth(query, partial, rest), atol=2e-6, rtol=2e-5)


@NATIVE
@pytest.mark.usefixtures("level")
def test_threads_share_rows_and_heads() -> None:
    query, partial, rest = problem(Case(batch=3, heads=3))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = attend_rest(query, partial, rest)
        torch.set_num_threads(4)
        shared = attend_rest(query, partial, rest)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, shared)


def test_states_of_other_types_are_read_by_torch() -> None:
    query, partial, rest = problem(HALVES[0])
    with recording() as ran:
        found = attend_rest(query, partial, rest)
    assert ran == ["attend_rest.naive"]
    torch.testing.assert_close(found.double(), truth(query, partial, rest), atol=2e-6, rtol=2e-5)
    if native.available():
        with using(attend_rest="cpu"), pytest.raises(KernelError, match="float16, it reads"):
            attend_rest(query, partial, rest)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"output_map": torch.zeros(2, 64, 64)}, r"the map: \[2, 128, 64\] expected"),
        ({"output_bias": torch.zeros(64)}, r"its bias: \[2, 64\] expected, given \[64\]"),
        ({"tail": (torch.zeros(1, 2, 9, 64), torch.zeros(1, 2, 8, 64))}, "values of the tail"),
        ({"sinks": (torch.zeros(1, 3, 9, 64), torch.zeros(1, 3, 9, 64))}, "keys of sinks"),
        ({"hidden": torch.zeros(1, 1, 1, 133, dtype=torch.bool)}, "the mask .* 134"),
        ({"hidden": torch.zeros(1, 1, 1, 134)}, "hidden is bool"),
        ({"null_scores": torch.zeros(2)}, r"null scores: \[6\] expected, given \[2\]"),
        ({"output_bias": torch.zeros(2, 64, device="meta")}, "on meta, queries are on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(wrong: dict[str, Any], message: str) -> None:
    query, partial, rest = problem(Case(predicts=True))
    with pytest.raises(KernelError, match=message):
        attend_rest(query, partial, rest._replace(**wrong))


@pytest.mark.parametrize(
    "kernel", [pytest.param("cpu", marks=NATIVE), pytest.param("triton", marks=TRITON)]
)
def test_a_model_of_any_type_is_read_in_fp32(kernel: str) -> None:
    query, partial, rest = problem(Case(predicts=True))
    halves = (
        partial._replace(output=partial.output.half(), lse=partial.lse.half()),
        rest._replace(output_map=rest.output_map.half()),
    )
    with using(attend_rest=kernel):
        found = attend_rest(query.double(), *halves)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth(query, *halves), atol=2e-6, rtol=2e-5)


@TRITON
def test_it_compiles_as_one_graph() -> None:
    with using(attend_rest="triton"):
        run = select("attend_rest", torch.float32, "cpu").kernel.run
    given = problem(Case(masked="query", predicts=True))
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*given), run(*given))
