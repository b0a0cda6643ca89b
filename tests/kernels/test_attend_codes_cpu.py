"""The compiled kernel of attention on codes against the naive one, at every SIMD level."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from tests.kernels.coded_cases import Case, problem
from vqkv.errors import KernelError
from vqkv.kernels import native, recording, select, using
from vqkv.kernels.attend.codes import Coded, Partial, Plane, Reader, attend_codes

pytestmark = pytest.mark.skipif(
    not native.available(), reason="the package was built without a C compiler"
)

#: Relative RMS of outputs, and absolute error of log-sum-exp: fp32, and 16 bits.
TOLERANCE: dict[native.Level, tuple[float, float]] = {
    "baseline": (1e-5, 1e-4),
    "avx2": (1e-5, 1e-4),
    "avx512": (1e-5, 1e-4),
    "avx512_vbmi": (3e-3, 1e-2),
    "avx512_vnni": (6e-3, 1e-2),
}
#: The same, where keys are turned as whole numbers of 16 bits.
TURNED: dict[native.Level, tuple[float, float]] = {
    **dict.fromkeys(TOLERANCE, (1e-3, 5e-3)),
    "baseline": TOLERANCE["baseline"],
    "avx512_vnni": TOLERANCE["avx512_vnni"],
}

CASES = [
    Case(),
    Case(rope=False, lengths=(0, 1, 63, 64, 65), sinks=4),
    Case(lengths=(0, 1, 63, 64, 65), group=1),
    Case(head_dim=80, group=1, rows=3, lengths=(130, 70)),
    Case(head_dim=80, rope=False, lengths=(515,)),
    Case(head_dim=96, group=4, rows=2, lengths=(600, 0), key_sums=True, paged=True),
    Case(head_dim=128, dim=8, stages=2, group=4, heads=1, key_sums=True),
    Case(head_dim=128, dim=8, rope=False, group=8, lengths=(1100,), size=100),
    Case(head_dim=256, dim=16, stages=3, group=4, heads=1, rope=False),
    Case(head_dim=256, dim=32, group=3, rows=5, lengths=(66,)),
    # Groups across what is looked up together.
    Case(head_dim=96, dim=12, stages=3, group=2, heads=1, lengths=(130,)),
    Case(head_dim=96, dim=48, group=2, heads=1, rope=False, lengths=(130,)),
    Case(dim=2, group=8, rows=2, lengths=(67, 200), paged=True, key_sums=True),
    Case(head_dim=66, dim=3, rope=False, lengths=(70,), size=7),
    Case(group=1, rows=16, lengths=(65,)),
    Case(head_dim=4, rope=False, lengths=(600,)),
    Case(head_dim=36, dim=1, rope=False, group=9, stages=2, lengths=(513,), key_sums=True),
    # Streams of unlike subvectors; rows that fill no block; a start in a later tile; many channels.
    Case(value_dim=8, value_stages=2, group=4, lengths=(600,), key_sums=True),
    Case(dim=8, value_dim=2, rope=False, group=4, lengths=(1600,), key_sums=True),
    Case(rope=False, group=7, lengths=(700,), key_sums=True, size=77),
    Case(rope=False, group=5, lengths=(1100, 600, 515), sinks=515, paged=True),
    Case(head_dim=640, rope=False, group=13, heads=1, lengths=(130,)),
    # All tokens alike: weights and values are as large as they can be.
    Case(rope=False, lengths=(1100,), size=1, key_sums=True),
    Case(dim=8, stages=3, lengths=(600,), size=1, key_sums=True),
    # More channels than whole numbers take.
    Case(head_dim=640, group=2, heads=1, lengths=(130,)),
    # Long enough for tables of scores.
    Case(rope=False, lengths=(1300, 1284, 7), sinks=4, paged=True, key_sums=True),
    Case(head_dim=128, dim=8, stages=2, rope=False, group=4, heads=1, lengths=(1600,)),
    Case(head_dim=80, dim=16, rope=False, group=2, rows=8, heads=1, lengths=(4700,), size=200),
    Case(head_dim=12, stages=3, rope=False, group=1, lengths=(1025,)),
]


@pytest.fixture(params=TOLERANCE)
def level(request: pytest.FixtureRequest) -> Iterator[native.Level]:
    try:
        with native.forced_level(request.param):
            yield request.param
    except KernelError as error:
        pytest.skip(str(error))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote is NaN."""
    empty: Callable[..., torch.Tensor] = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan)
    )


def run(kernel: str, case: Case, query: torch.Tensor, coded: Coded) -> Partial:
    with using(attend_codes=kernel), recording() as ran:
        found = attend_codes(query, coded, case.layout)
    assert ran == [f"attend_codes.{kernel}"]
    return found


def assert_same(found: Partial, expected: Partial, level: native.Level, case: Case) -> None:
    turned = case.rope and case.dim % 4 == 0 and case.stages <= 16
    relative, absolute = (TURNED if turned else TOLERANCE)[level]
    for mine, truth in ((found.output, expected.output), (found.key_mean, expected.key_mean)):
        if truth is None:
            assert mine is None
            continue
        assert mine is not None and mine.dtype == torch.float32
        scale = truth.square().mean().sqrt()
        assert (mine - truth).square().mean().sqrt() <= relative * scale
    # Exactly where there are no tokens is it −inf, and means zero.
    assert torch.equal(found.lse.isneginf(), expected.lse.isneginf())
    assert not found.output[found.lse.isneginf()].any()
    there = ~expected.lse.isneginf()
    assert not there.any() or (found.lse - expected.lse)[there].abs().max() <= absolute


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_equals_the_naive_kernel(level: native.Level, case: Case, poisoned: None) -> None:
    query, coded = problem(case)
    assert_same(run("cpu", case, query, coded), run("naive", case, query, coded), level, case)


@pytest.mark.parametrize("case", [CASES[0], CASES[5], CASES[11]], ids=str)
def test_threads_share_the_tokens_of_few_heads(
    level: native.Level, case: Case, poisoned: None
) -> None:
    case = replace(case, lengths=(2100, 5, 0), heads=1)
    query, coded = problem(case)
    expected = run("naive", case, query, coded)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(7)
        found = run("cpu", case, query, coded)
    finally:
        torch.set_num_threads(threads)
    assert_same(found, expected, level, case)


@pytest.mark.parametrize("paged", [False, True])
def test_strides_are_free(level: native.Level, paged: bool) -> None:
    case = Case(lengths=(130, 70), paged=paged, key_sums=True)
    query, coded = problem(case)
    expected = run("naive", case, query, coded)

    def spread(codes: torch.Tensor) -> torch.Tensor:
        """The same codes, tokens before heads, with codes of others between them."""
        wide = torch.full((*codes.shape[:3], codes.shape[3] + 5), 255, dtype=torch.uint8)
        wide[..., 3:-2] = codes
        return wide.transpose(1, 2).contiguous().transpose(1, 2)[..., 3:-2]

    planes = [plane._replace(codes=spread(plane.codes)) for plane in (coded.keys, coded.values)]
    coded = coded._replace(keys=planes[0], values=planes[1])
    assert coded.turns is not None
    page = coded.turns.page.expand(2, -1, -1, -1).transpose(0, 1).contiguous().transpose(0, 1)
    coded = coded._replace(turns=coded.turns._replace(page=page))
    assert_same(run("cpu", case, query, coded), expected, level, case)


def test_rows_may_share_the_turns_of_pages(level: native.Level) -> None:
    case = Case(lengths=(130, 70))
    query, coded = problem(case)
    assert coded.turns is not None
    coded = coded._replace(turns=coded.turns._replace(page=coded.turns.page[:1]))
    assert_same(run("cpu", case, query, coded), run("naive", case, query, coded), level, case)


def aligned(case: Case, query: torch.Tensor, coded: Coded) -> Coded:
    """All keys are the query, before a RoPE that turns nothing."""
    assert coded.turns is not None
    groups = query[0, :, 0].view(case.heads, -1, 1, 1, case.dim)
    words = groups.expand(-1, -1, case.stages, case.size, -1).clone()
    words[:, :, 1:] = 0
    turns = coded.turns
    page, offset = torch.zeros_like(turns.page), torch.zeros_like(turns.offset)
    page[..., 0], offset[..., 0] = 1, 1
    turned = turns._replace(page=page, offset=offset)
    return coded._replace(keys=coded.keys._replace(codewords=words), turns=turned)


@pytest.mark.parametrize("dim", [2, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "equal", "one pair", "odd pairs"])
def test_the_largest_products_do_not_overflow(level: native.Level, dim: int, kind: str) -> None:
    case = Case(heads=1, group=1, head_dim=256, dim=dim, lengths=(70,))
    query, coded = problem(case)
    if kind != "normal":
        query = torch.zeros_like(query)
        query[
            ...,
            {"equal": slice(None), "one pair": slice(6, 8), "odd pairs": slice(2, None, 4)}[kind],
        ] = 1
    coded = aligned(case, query, coded)
    found, expected = run("cpu", case, query, coded), run("naive", case, query, coded)
    relative, absolute = TURNED[level]
    torch.testing.assert_close(found.lse, expected.lse, rtol=relative, atol=absolute)
    torch.testing.assert_close(found.output, expected.output, rtol=relative, atol=absolute)


@pytest.mark.parametrize("head_dim", [128, 256])
def test_rounding_does_not_lean_to_one_side(level: native.Level, head_dim: int) -> None:
    """Under a query whose channels have one sign it would not cancel."""
    case = Case(heads=1, group=1, head_dim=head_dim, lengths=(640,))
    query, coded = problem(case)
    coded = aligned(case, query, coded)._replace(keys=coded.keys)
    query = torch.full_like(query, 0.5)
    assert_same(run("cpu", case, query, coded), run("naive", case, query, coded), level, case)


@pytest.mark.parametrize("stages", [16, 17])
def test_stages_may_be_as_many_as_whole_numbers_take_or_more(
    level: native.Level, stages: int
) -> None:
    case = Case(stages=stages, lengths=(70,), group=4)
    query, coded = problem(case)
    for plane in (coded.keys, coded.values):
        plane.codewords[:] *= (0.7 ** torch.arange(stages))[:, None, None]
    assert_same(run("cpu", case, query, coded), run("naive", case, query, coded), level, case)


@pytest.mark.parametrize("scale", [0.3, 1.4, 30])
def test_a_model_may_scale_its_turns(level: native.Level, scale: float) -> None:
    case = Case(lengths=(130, 70))
    query, coded = problem(case)
    assert coded.turns is not None
    turns = coded.turns._replace(offset=scale * coded.turns.offset)
    coded = coded._replace(turns=turns)
    query = query / scale
    assert_same(run("cpu", case, query, coded), run("naive", case, query, coded), level, case)


@pytest.mark.parametrize("rope", [False, True])
def test_scores_far_apart_neither_overflow_nor_vanish(level: native.Level, rope: bool) -> None:
    case = Case(lengths=(1200,), rope=rope)
    query, coded = problem(case)
    query = 300 * query  # scores of some hundreds: one token takes it all
    found = run("cpu", case, query, coded)
    assert found.output.isfinite().all()
    expected = run("naive", case, query, coded)
    torch.testing.assert_close(found.lse, expected.lse, rtol=1e-2, atol=0)


def test_later_tiles_may_leave_nothing_of_earlier_ones(level: native.Level) -> None:
    """Scores of the second tile are far above those of the first, for some rows."""
    case = Case(lengths=(1200,), rope=False, group=3, key_sums=True)
    query, coded = problem(case)
    query[:, 0], query[:, 3] = 0, 0
    coded.keys.codewords[:, 0, 0, 7] = 100 * query[0, 1::3, 0, :4].sign()
    coded.keys.codes[..., 0] = coded.keys.codes[..., 0].clamp_min(8)
    coded.keys.codes[:, :, 700:800, 0] = 7
    found, expected = run("cpu", case, query, coded), run("naive", case, query, coded)
    torch.testing.assert_close(found.output, expected.output, rtol=2e-2, atol=5e-3)
    torch.testing.assert_close(found.key_mean, expected.key_mean, rtol=2e-2, atol=5e-3)


def test_tokens_without_a_finite_score_weigh_nothing(level: native.Level) -> None:
    """A whole tile of them, and then others."""
    case = Case(lengths=(600,), rope=False, group=1)
    query, coded = problem(case)
    coded.keys.codewords[:, 0, 0, 7] = -torch.inf
    coded.keys.codes[..., 0] = coded.keys.codes[..., 0].clamp_min(8)
    coded.keys.codes[:, :, :512, 0] = 7
    query[..., :4] = query[..., :4].abs() + 0.1
    found = run("cpu", case, query, coded)
    expected = run("naive", case, query, coded)
    torch.testing.assert_close(found.lse, expected.lse, rtol=5e-2, atol=5e-2)
    torch.testing.assert_close(found.output, expected.output, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("part", ["query", "zeros", "keys", "values", "turns"])
@pytest.mark.parametrize("channel", [0, 1, 2, 3])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_what_is_not_a_number_is_not_hidden(
    level: native.Level, part: str, channel: int, number: float
) -> None:
    case = CASES[0]
    query, coded = problem(case)
    if part == "zeros":
        query[0, 0, 0] = 0.0
    if part in ("query", "zeros"):
        query[0, 0, 0, channel] = number
    elif part == "turns":
        assert coded.turns is not None
        coded.turns.offset[5, channel // 2, channel % 2] = number
    else:
        plane = coded.keys if part == "keys" else coded.values
        plane.codewords[:, 0, 0, :, channel] = number
    found = run("cpu", case, query, coded).output[0, 0, 0]
    assert not found.isfinite().all()


@pytest.mark.parametrize("lead", [8, 12])
def test_a_token_of_no_value_does_not_hide_the_others(level: native.Level, lead: float) -> None:
    """It has nearly all of the weight, as sinks have."""
    case = Case(heads=1, group=1, rope=False, dim=2, lengths=(500,))
    query, coded = problem(case)
    query = 0.01 * query
    query[..., 0] = 1.0
    coded.keys.codewords[0, 0, 0, :, 0] = 0.0
    coded.keys.codewords[0, 0, 0, 9, 0] = lead
    coded.values.codewords[..., 9, :] = 0.0
    for plane in (coded.keys, coded.values):
        plane.codes[plane.codes == 9] = 8
        plane.codes[:, :, 77] = 9
    assert_same(run("cpu", case, query, coded), run("naive", case, query, coded), level, case)


def has_tables() -> bool:
    return native.available() and native.simd_level() in ("avx512_vbmi", "avx512_vnni")


@pytest.mark.skipif(not has_tables(), reason="this CPU looks up no bytes in registers")
def test_scores_from_tables_stay_within_their_bits() -> None:
    """All columns round up: 64 halves of a step more than the score has."""
    case = Case(heads=1, group=1, head_dim=256, rope=False, lengths=(1024,))
    query, coded = problem(case)
    word, part = coded.keys.codewords[0, 0, 0].bfloat16().float(), query[0, 0, 0, :4].bfloat16()
    query = part.float().repeat(64).view(1, 1, 1, 256)
    products = word @ part.float()
    codes = torch.full_like(coded.keys.codes, int(products.argmin()))
    codes[0, 0, 777] = products.argmax()
    coded = coded._replace(keys=Plane(codes, word.expand(1, 64, 1, 256, 4)))
    expected = run("naive", case, query, coded).lse
    torch.testing.assert_close(run("cpu", case, query, coded).lse, expected, atol=0.05, rtol=0)


@pytest.mark.skipif(not has_tables(), reason="this CPU looks up no bytes in registers")
@pytest.mark.parametrize("tokens, tables", [(1535, False), (1536, True)])
def test_tables_are_used_where_they_pay(tokens: int, tables: bool) -> None:
    case = Case(group=4, rope=False, lengths=(tokens,))
    query, coded = problem(case)
    with native.forced_level("avx512_vbmi"):
        found = run("cpu", case, query, coded)
    with native.forced_level("avx512"):
        decoded = run("cpu", case, query, coded)
    assert torch.equal(found.lse, decoded.lse) is not tables


@pytest.mark.skipif(native.simd_level()[:6] != "avx512", reason="this CPU has no AVX-512")
def test_by_codeword_levels_do_the_same() -> None:
    """What has no faster way at a higher level is as at the one below, bit for bit."""
    case = Case(rope=False, group=8, dim=8, lengths=(1700,))
    query, coded = problem(case)
    with native.forced_level("avx512"):
        expected = run("cpu", case, query, coded)
    found = run("cpu", case, query, coded)
    assert torch.equal(found.output, expected.output) and torch.equal(found.lse, expected.lse)


@pytest.mark.parametrize("stream", ["keys", "values"])
def test_codes_that_name_no_codeword_are_refused(level: native.Level, stream: str) -> None:
    case = Case(size=100)
    query, coded = problem(case)
    getattr(coded, stream).codes[0, 1, 69, 3] = 100
    with pytest.raises(KernelError, match="a code names no codeword"):
        run("cpu", case, query, coded)


def test_what_lies_before_the_start_is_not_looked_at(level: native.Level) -> None:
    case = Case(size=100, paged=True, lengths=(200,), sinks=70)
    query, coded = problem(case)
    expected = run("naive", case, query, coded)
    assert coded.pages is not None
    second = int(coded.pages[0, 1])
    coded.keys.codes[second, :, :6] = 255
    coded.values.codes[second, :, :6] = 255
    coded.pages[0, 0] = -1
    assert_same(run("cpu", case, query, coded), expected, level, case)


@pytest.mark.parametrize("block", [-1, 2])
def test_pages_that_name_no_block_are_refused(level: native.Level, block: int) -> None:
    case = Case(paged=True)
    query, coded = problem(case)
    assert coded.pages is not None
    coded.pages[0, 1] = block
    with pytest.raises(KernelError, match="a page number names no block"):
        run("cpu", case, query, coded)


def test_what_points_outside_of_memory_is_refused() -> None:
    case = Case()
    query, coded = problem(case)
    assert coded.turns is not None
    turns = coded.turns
    wrong = [
        (coded._replace(stop=coded.stop + 64), "start and stop lie in 0 to 128, given 0 to 134"),
        (coded._replace(start=coded.start - 1), "given -1 to 70"),
        (
            coded._replace(turns=turns._replace(pairs=turns.pairs + 1)),
            "pairs lie in 0 to 31, given 1 to 32",
        ),
        (coded._replace(turns=turns._replace(page=turns.page[:, :1])), "turns of pages are"),
        (coded._replace(order=torch.full((2, 64), 64)), "a channel that is not there"),
        (coded._replace(order=torch.full((2, 64), -1)), "a channel that is not there"),
    ]
    for bad, message in wrong:
        with pytest.raises(KernelError, match=message):
            run("cpu", case, query, bad)


@pytest.mark.parametrize("rope", [False, True])
def test_queries_come_in_the_order_that_is_named(level: native.Level, rope: bool) -> None:
    case = Case(rope=rope, rows=2, lengths=(130, 70))
    query, coded = problem(case)
    order = torch.stack([torch.randperm(case.head_dim) for _ in range(case.heads)])
    mixed = torch.empty_like(query)
    by_head = order.repeat_interleave(case.group, 0)[None, :, None].expand_as(query)
    mixed.scatter_(3, by_head, query)
    found = run("cpu", case, mixed, coded._replace(order=order))
    assert_same(found, run("cpu", case, query, coded), level, case)


def test_a_reader_takes_one_query_after_another(level: native.Level) -> None:
    case = Case(lengths=(130, 70), key_sums=True)
    query, coded = problem(case)
    read = Reader(coded, case.layout)
    for each in (query, -query, query.repeat(1, 1, 3, 1), query.half()):
        assert_same(read(each), run("naive", case, each, coded), level, case)
    with pytest.raises(KernelError, match=r"codes are \[1, 2, T, 16\]"):
        read(query[:1])


def test_a_reader_follows_tensors_that_move() -> None:
    """As when they are sent to another process."""
    case = Case()
    query, coded = problem(case)
    read = Reader(coded, case.layout)
    expected = read(query)
    for tensor in (*coded.keys, *coded.values, coded.start, coded.stop, *(coded.turns or ())):
        before = tensor.data_ptr()
        tensor.share_memory_()
        assert tensor.data_ptr() != before
    torch.testing.assert_close(tuple(read(query)[:2]), tuple(expected[:2]))


def test_threads_may_use_one_reader_and_their_number_change() -> None:
    case = Case(lengths=(2100, 600), heads=1)
    query, coded = problem(case)
    read, queries = Reader(coded, case.layout), [query * (i + 1) / 8 for i in range(8)]
    expected = [run("cpu", case, each, coded).output for each in queries]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            found = [each.output for each in pool.map(read, queries)]
            torch.testing.assert_close(found, expected, atol=0, rtol=0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(7)
        found = [read(each).output for each in queries]
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-2)


def test_it_is_chosen_on_cpus() -> None:
    assert select("attend_codes", Case().layout, "cpu").kernel.name == "cpu"
