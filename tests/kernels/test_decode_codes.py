from __future__ import annotations

import pytest
import torch

from tests.kernels.coded_cases import Case, problem
from tests.kernels.test_encode_decode import able
from vqkv.errors import KernelError
from vqkv.kernels import recording, select, using
from vqkv.kernels.attend.codes_naive import decoded, rotated
from vqkv.kernels.decode.codes import decode_codes

CASES = [
    Case(rope=False, lengths=(130, 70)),
    Case(head_dim=80, lengths=(130,)),
    Case(dim=2, lengths=(70, 200), paged=True),
    Case(head_dim=96, dim=8, stages=2, lengths=(130,), size=16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("tokens", [range(64), range(64, 128), range(64, 101), range(0)], ids=str)
@pytest.mark.parametrize("kernel", [name for name in ("naive", "triton") if name in able("decode")])
def test_a_range_of_pages_is_decoded(kernel: str, tokens: range, case: Case) -> None:
    _, coded = problem(case)
    expected = decoded(coded.keys, coded.pages)
    if coded.turns is not None:
        expected = rotated(expected, coded.turns)
    with using(decode_codes=kernel), recording() as ran:
        states = decode_codes(
            coded.keys, tokens, case.layout.keys, coded.turns, coded.pages, torch.float16
        )
    assert ran == [f"decode_codes.{kernel}"]
    assert states.dtype == torch.float16
    torch.testing.assert_close(
        states, expected[:, :, tokens.start : tokens.stop].half(), atol=4e-3, rtol=1e-3
    )


def test_ranges_begin_with_a_page() -> None:
    _, coded = problem(Case())
    with pytest.raises(KernelError, match="multiple of 64 tokens"):
        decode_codes(coded.keys, range(3, 64), Case().layout.keys)


@pytest.mark.skipif("triton" not in able("decode"), reason="Triton is not installed")
def test_it_compiles_as_one_graph() -> None:
    case = Case()
    _, coded = problem(case)
    with using(decode_codes="triton"):
        kernel = select("decode_codes", case.layout.keys, "cpu").kernel
    compiled = torch.compile(kernel.run, backend="aot_eager", fullgraph=True)
    arguments = (coded.keys, range(64), coded.turns, coded.pages, torch.float16)
    assert torch.equal(compiled(*arguments), kernel.run(*arguments))
