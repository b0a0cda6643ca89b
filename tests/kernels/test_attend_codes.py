from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.coded_cases import Case, problem, with_codes
from vqkv.errors import KernelError
from vqkv.kernels import native, recording, using
from vqkv.kernels.attend import codes
from vqkv.kernels.attend.codes import Coded, Partial, attend_codes
from vqkv.kernels.select import Kernel, Selection, anywhere

CASES = [
    Case(),
    Case(rope=False, lengths=(64, 1, 130), sinks=4),
    Case(head_dim=80, group=1, rows=3, lengths=(130, 70)),
    Case(head_dim=128, dim=8, stages=2, group=4, heads=1, key_sums=True),
    Case(dim=2, group=8, rows=2, lengths=(67, 200), paged=True, key_sums=True),
]


def truth(query: torch.Tensor, coded: Coded, row: int, head: int) -> tuple[torch.Tensor, ...]:
    """One query head of one row, token by token in fp64."""
    heads = coded.keys.codewords.shape[0]
    kv = head // (query.shape[1] // heads)
    scores, keys, values = [], [], []
    for token in range(int(coded.start[row]), int(coded.stop[row])):
        vectors = []
        for plane in (coded.keys, coded.values):
            at = (row, kv, token)
            if coded.pages is not None:
                at = (int(coded.pages[row, token // 64]), kv, token % 64)
            codes = plane.codes[at].view(plane.codewords.shape[1:3]).long()
            groups, stages = codes.shape
            words = plane.codewords[kv].double()
            vectors.append(
                torch.cat(
                    [
                        torch.stack([words[m, s, codes[m, s]] for s in range(stages)]).sum(0)
                        for m in range(groups)
                    ]
                )
            )
        keys.append(vectors[0])
        values.append(vectors[1])
        key = vectors[0]
        if coded.turns is not None:
            page, offset, pairs = coded.turns
            turn = torch.view_as_complex(page[row, token // 64].double())
            turn = turn * torch.view_as_complex(offset[token % 64].double())
            paired = torch.view_as_complex(key.view(-1, 2))
            key = torch.view_as_real(paired * turn[pairs[kv].long()]).flatten()
        scores.append(query[row, head].double() @ key)
    score = torch.stack(scores, 1)
    weights = score.softmax(1)
    return weights @ torch.stack(values), score.logsumexp(1), weights @ torch.stack(keys)


KERNELS = ["naive", "cpu"] if native.available() else ["naive"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_naive_equals_a_loop_over_tokens(case: Case) -> None:
    query, coded = problem(case)
    with using(attend_codes="naive"), recording() as ran:
        found = attend_codes(query, coded, case.layout)
    assert ran == ["attend_codes.naive"]
    for row in range(len(case.lengths)):
        for head in range(query.shape[1]):
            if case.lengths[row] <= case.sinks:
                assert (found.output[row, head] == 0).all()
                assert (found.lse[row, head] == -torch.inf).all()
                continue
            output, lse, key_mean = truth(query, coded, row, head)
            torch.testing.assert_close(found.output[row, head].double(), output, atol=1e-4, rtol=0)
            torch.testing.assert_close(found.lse[row, head].double(), lse, atol=1e-4, rtol=0)
            if case.key_sums:
                assert found.key_mean is not None
                torch.testing.assert_close(
                    found.key_mean[row, head].double(), key_mean, atol=1e-4, rtol=0
                )
    assert isinstance(found, Partial)


@pytest.mark.parametrize("kernel", KERNELS)
def test_room_for_pages_that_have_no_turns_yet_is_not_read(kernel: str) -> None:
    case = Case(lengths=(130, 64))
    query, coded = problem(case)
    roomy = with_codes(coded, lambda codes: torch.nn.functional.pad(codes, (0, 0, 0, 256)))
    with using(attend_codes=kernel):
        expected, found = (attend_codes(query, each, case.layout) for each in (coded, roomy))
    torch.testing.assert_close(tuple(found), tuple(expected))


def test_what_a_kernel_finds_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    query, coded = problem(Case())
    found = Partial(query[:, :1], query[:, :1, :, 0])
    wrong = Kernel("attend_codes", "wrong", lambda *_: found, anywhere, speed=0)
    monkeypatch.setattr(codes, "selection", lambda *_: Selection(wrong))
    with pytest.raises(KernelError, match=r"the kernel's output: \[1, 6, 1, 64\] on cpu"):
        attend_codes(query, coded, Case().layout)


def test_bounds_that_do_not_fit_are_refused() -> None:
    query, coded = problem(Case())
    with pytest.raises(KernelError, match=r"start is int32 \[1\]"):
        attend_codes(query, coded._replace(start=coded.start.repeat(2)), Case().layout)
    with pytest.raises(KernelError, match=r"stop is int32"):
        attend_codes(query, coded._replace(stop=coded.stop.float()), Case().layout)


def test_planes_that_do_not_fit_are_refused() -> None:
    query, coded = problem(Case())
    wrong = [
        (coded.keys._replace(codes=coded.keys.codes.int()), "codes are uint8"),
        (coded.keys._replace(codes=coded.keys.codes[..., :-1]), r"codes are \[1, 2, T, 16\]"),
        (coded.keys._replace(codewords=coded.keys.codewords[:, 1:]), r"M · d = 64"),
    ]
    for plane, message in wrong:
        with pytest.raises(KernelError, match=message):
            attend_codes(query, coded._replace(keys=plane), Case().layout)
    with pytest.raises(KernelError, match=r"order is int64 \[2, 64\]"):
        attend_codes(query, coded._replace(order=torch.arange(64)), Case().layout)
    with pytest.raises(KernelError, match="1 to 16 rows"):
        attend_codes(query.expand(-1, -1, 17, -1), coded, Case().layout)
    with pytest.raises(KernelError, match="turns are"):
        assert coded.turns is not None
        turns = coded.turns._replace(pairs=coded.turns.pairs.long())
        attend_codes(query, coded._replace(turns=turns), Case().layout)


def test_layouts_that_cannot_be_read_say_why() -> None:
    query, coded = problem(Case())
    keys, values = Case().layout
    wrong = [
        (replace(keys, head_local=False), "mix heads"),
        (replace(keys, token_group=16), "runs of 16 tokens"),
        (replace(keys, pairs_whole=False), "pairs split"),
        (replace(keys, segments=keys.segments * 2), "2 segments"),
    ]
    for layout, message in wrong:
        with pytest.raises(KernelError, match=message):
            attend_codes(query, coded, Case().layout._replace(keys=layout, values=values))
