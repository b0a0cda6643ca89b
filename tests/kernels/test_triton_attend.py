"""Attention on codes in Triton, interpreted; in fp16, since the interpreter's bf16 is wrong."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.coded_cases import Case, askew, problem, with_codes
from vqkv.kernels import gpu, recording, select, using
from vqkv.kernels.attend.codes import Coded, Partial, attend_codes

pytestmark = pytest.mark.skipif(not gpu.installed(), reason="Triton is not installed")

CASES = [
    Case(rope=False, lengths=(64, 1, 0), sinks=4),
    Case(lengths=(70, 3), paged=True),
    Case(head_dim=80, group=1, rows=3, lengths=(130, 70)),
    Case(head_dim=96, dim=8, group=1, rope=False, size=16, paged=True),
    Case(head_dim=128, dim=8, stages=2, group=4, heads=1, key_sums=True),
    Case(head_dim=256, dim=16, heads=1, group=1, rope=False),
    Case(head_dim=64, dim=2, group=8, rows=5, heads=1, key_sums=True),
    Case(head_dim=32, dim=8, stages=4, heads=1, lengths=(500,), sinks=100, key_sums=True),
]


def both(query: torch.Tensor, coded: Coded, case: Case) -> tuple[Partial, Partial]:
    """What the naive kernel gives, and what the one in Triton does."""
    with using(attend_codes="naive"):
        naive = attend_codes(query, coded, case.layout)
    with using(attend_codes="triton"), recording() as ran:
        fused = attend_codes(query, coded, case.layout)
    assert ran == ["attend_codes.triton"]
    return naive, fused


def assert_equal_up_to_fp16(naive: Partial, fused: Partial, bound: float = 2e-3) -> None:
    for expected, found in zip(naive, fused, strict=True):
        if expected is None or found is None:
            assert expected is found
            continue
        assert found.shape == expected.shape and found.dtype == torch.float32
        some = expected.isfinite()
        assert torch.equal(found[~some], expected[~some])
        error = (found - expected)[some].square().mean().sqrt()
        assert error <= bound * expected[some].square().mean().sqrt()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_equals_the_naive_kernel(case: Case) -> None:
    assert_equal_up_to_fp16(*both(*problem(case), case))


def test_codes_that_lie_askew_are_read() -> None:
    case = Case(rope=False, lengths=(67, 67))
    query, coded = problem(case)
    coded = with_codes(coded, askew)
    assert_equal_up_to_fp16(*both(query, coded, case))


def test_what_no_row_counts_is_not_read() -> None:
    case = Case(rope=False, lengths=(70, 70), sinks=4, size=16)
    query, coded = problem(case)
    expected = both(query, coded, case)[1]
    for plane in (coded.keys, coded.values):
        plane.codes[:, :, 70:] = 255  # names no codeword of 16
        plane.codes[:, :, :4] = 255
    with using(attend_codes="triton"):
        found = attend_codes(query, coded, case.layout)
    assert torch.equal(found.output, expected.output)


def test_queries_and_codewords_of_other_types() -> None:
    case = Case(lengths=(70,))
    query, coded = problem(case)
    coded = coded._replace(
        keys=coded.keys._replace(codewords=coded.keys.codewords.float()),
        values=coded.values._replace(codewords=coded.values.codewords.float()),
    )
    assert_equal_up_to_fp16(*both(query.half(), coded, case))
    assert_equal_up_to_fp16(*both(query.bfloat16(), coded, case))
    coded.keys.codewords.mul_(-1)  # what was converted before no longer counts
    assert_equal_up_to_fp16(*both(query, coded, case))


def test_it_compiles_as_one_graph() -> None:
    case = Case(lengths=(70,), key_sums=True, paged=True)
    query, coded = problem(case)
    with using(attend_codes="triton"):
        kernel = select("attend_codes", case.layout, "cpu").kernel
    compiled = torch.compile(kernel.run, backend="aot_eager", fullgraph=True)
    for expected, found in zip(kernel.run(query, coded), compiled(query, coded), strict=True):
        assert torch.equal(expected, found)


def test_a_cpu_gets_it_only_when_asked_for() -> None:
    layout = Case().layout
    selection = select("attend_codes", layout, "cpu")
    assert selection.kernel.name != "triton"
    assert selection.refused["attend_codes.triton"] == "runs on cpu only when asked for"
    assert select("attend_codes", Case(head_dim=80).layout, "cuda").kernel.name == "triton"


def test_a_cpu_without_the_interpreter_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    reason = gpu.unavailable_reason(torch.device("cpu"))
    assert reason is not None and "runs on cuda, not on cpu; TRITON_INTERPRET=1" in reason
    assert gpu.unavailable_reason(torch.device("cuda")) is None


def test_shapes_that_it_cannot_read_say_why() -> None:
    for case, message in (
        (Case(dim=1, rope=False), "subvectors of 1 channels"),
        (Case(stages=3), "in 3 stages"),
        (Case(head_dim=512), "head dim 512"),
    ):
        refused = select("attend_codes", case.layout, "cuda").refused["attend_codes.triton"]
        assert message in refused
