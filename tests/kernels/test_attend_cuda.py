"""The CUDA kernel, its threads emulated on the CPU; and compiled, in `test_offline.py`."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.coded_cases import Case, askew, by_token, problem, with_codes
from tests.kernels.emulation import COMPILER, Emulator
from vqkv.kernels import select, using
from vqkv.kernels.attend.codes import Coded, attend_codes
from vqkv.kernels.attend.codes_op import Found
from vqkv.kernels.cuda.attend_ops import attend
from vqkv.kernels.cuda.configs import MOST_SHARED_BYTES, AttendVariant
from vqkv.kernels.cuda.tables import as_read, key_table, offset_turns, value_table

needs_a_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")

CASES = [
    Case(rope=False, lengths=(64, 1, 0), sinks=4),
    Case(lengths=(70, 3), group=4),
    Case(head_dim=128, heads=1, group=8, lengths=(330,), sinks=70, key_sums=True),
    Case(head_dim=128, group=4, lengths=(300, 70), paged=True, key_sums=True, sinks=4),
    Case(head_dim=128, dim=8, heads=1, group=5, rows=2, lengths=(130,), key_sums=True),
    Case(dim=8, group=4, rows=7, heads=1, lengths=(140, 9), size=16),
    # Both of a warp's tiles, and a ring of pages, whose queries are turned ahead, that goes round.
    Case(head_dim=128, heads=1, group=4, lengths=(64 * 37 - 5,), sinks=4),
    Case(heads=1, group=8, lengths=(64 * 21 + 1,), sinks=4, paged=True),
    Case(head_dim=128, dim=8, heads=1, group=4, rope=False, lengths=(64 * 20 - 9, 130), sinks=70),
    Case(heads=2, group=3, lengths=(64 * 9 - 3,), key_sums=True),
    # More warps, as there are many pages.
    Case(head_dim=128, heads=1, group=4, rope=False, lengths=(64 * 17 - 9,), paged=True),
    # Several chunks of them.
    Case(group=4, rows=4, heads=1, lengths=(64 * 13 - 5,), sinks=4),
    Case(group=8, heads=1, lengths=(64 * 19,), key_sums=True, paged=True),
]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(tmp_path_factory.mktemp("emulated"))


def rounded(coded: Coded) -> Coded:
    """With codewords as the kernel reads them."""
    keys, values = (
        plane._replace(codewords=as_read(plane.codewords)) for plane in (coded.keys, coded.values)
    )
    return coded._replace(keys=keys, values=values)


def assert_equals_the_naive_kernel(
    found: Found, query: torch.Tensor, coded: Coded, case: Case
) -> None:
    with using(attend_codes="naive"):
        naive = attend_codes(query, rounded(coded), case.layout)
    output, lse, means = found
    some = naive.lse.isfinite()
    assert torch.equal(lse[~some], naive.lse[~some])
    assert ((lse - naive.lse).abs() <= 5e-4 * (5 + naive.lse.abs()))[some].all()
    pairs = [(output, naive.output)]
    if naive.key_mean is not None:
        pairs.append((means, naive.key_mean))
    for one, other in pairs:
        assert one.shape == other.shape
        assert (one - other).square().mean().sqrt() <= 2e-3 * other.square().mean().sqrt()


@needs_a_compiler
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_equals_the_naive_kernel(emulator: Emulator, case: Case, splits: int) -> None:
    query, coded = problem(case)
    found = attend(query, coded, splits, emulator.launch)
    assert_equals_the_naive_kernel(found, query, coded, case)


@needs_a_compiler
@pytest.mark.parametrize("key_sums", [False, True])
def test_more_splits_than_lanes_are_merged(emulator: Emulator, key_sums: bool) -> None:
    case = Case(heads=1, group=4, lengths=(64 * 45, 3, 0), rope=False, key_sums=key_sums)
    query, coded = problem(case)
    found = attend(query, coded, 40, emulator.launch)
    assert_equals_the_naive_kernel(found, query, coded, case)


@needs_a_compiler
def test_codes_that_lie_askew_are_read(emulator: Emulator) -> None:
    case = Case(rope=False, lengths=(67, 67), group=4)
    query, coded = problem(case)
    coded = with_codes(coded, askew)
    found = attend(query, coded, 1, emulator.launch)
    assert_equals_the_naive_kernel(found, query, coded, case)


@needs_a_compiler
def test_a_head_may_hold_its_tokens_between_those_of_others(emulator: Emulator) -> None:
    case = Case(rope=False, lengths=(100,), group=4)
    query, coded = problem(case)
    coded = with_codes(coded, by_token)
    found = attend(query, coded, 1, emulator.launch)
    assert_equals_the_naive_kernel(found, query, coded, case)


@needs_a_compiler
def test_large_scores_late_in_a_context_scale_sums_down(emulator: Emulator) -> None:
    case = Case(rope=False, lengths=(400,), heads=1, group=4, key_sums=True)
    query, coded = problem(case)
    coded.keys.codewords[:, :, :, 0] = 0
    coded.keys.codes[:, :, :256] = 0  # every warp's first tile scores 0
    query = query * 3
    found = attend(query, coded, 1, emulator.launch)
    assert_equals_the_naive_kernel(found, query, coded, case)


@needs_a_compiler
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("dim", [4, 8])
def test_products_with_queries_of_another_order_count_for_nothing(
    emulator: Emulator, dim: int, rope: bool
) -> None:
    """Queries lie in even subvectors and keys in odd ones, so that exchanged they score most."""
    case = Case(head_dim=128, dim=dim, heads=1, group=4, rope=rope, lengths=(300,), key_sums=True)
    query, coded = problem(case)
    even = torch.arange(128) // dim % 2 == 0
    query = torch.where(even, query * 30, query * 0.3)
    coded.keys.codewords[:, 0::2] *= 0.01
    coded.keys.codewords[:, 1::2] *= 3
    found = attend(query, coded, 1, emulator.launch)
    assert_equals_the_naive_kernel(found, query, coded, case)


@needs_a_compiler
@pytest.mark.parametrize("head_dim, dim", [(128, 4), (128, 8), (64, 4), (64, 8)])
@pytest.mark.parametrize("group", [4, 8])
@pytest.mark.parametrize("rope", [False, True])
def test_look_ups_never_meet_in_a_bank(
    emulator: Emulator, head_dim: int, dim: int, group: int, rope: bool
) -> None:
    """So 32 take the fewest wavefronts there are, whatever the codes."""
    case = Case(head_dim=head_dim, dim=dim, heads=1, group=group, lengths=(256,), rope=rope)
    query, coded = problem(case)
    attend(query, coded, 1, emulator.launch)
    assert emulator.wavefronts == (dim / 4, dim / 4)


def test_codewords_are_rounded_by_a_sixteenth_at_most() -> None:
    words = torch.randn(2, 16, 1, 200, 4) * torch.tensor([1e-3, 1e3])[:, None, None, None, None]
    error = (as_read(words) - words).abs()
    # From 2⁻⁶ of the scale on, numbers are subnormal, with a fixed step of 2⁻⁹.
    least = key_table(words).scale[:, None, None, None, None] * 2.0**-10
    assert (error <= torch.maximum(words.abs() / 16, least)).all()
    assert torch.equal(as_read(torch.zeros(1, 8, 1, 256, 4)), torch.zeros(1, 8, 1, 256, 4))


def test_codewords_changed_in_place_change_their_tables_in_place() -> None:
    words = torch.randn(1, 8, 1, 256, 8)
    read = as_read(words)
    tables = key_table(words), value_table(words)
    before = [table.entries.clone() for table in tables]
    words.neg_()
    assert torch.equal(as_read(words), -read)
    for old, new, bits in zip(tables, (key_table(words), value_table(words)), before, strict=True):
        assert new.entries is old.entries
        assert torch.equal(new.entries & 127, bits & 127) and not torch.equal(new.entries, bits)


def test_turns_within_a_page_are_converted_once_of_each_pair_of_tensors() -> None:
    offset, pairs = (
        torch.randn(64, 32, 2),
        torch.stack([torch.randperm(32) for _ in range(2)]).int(),
    )
    table = offset_turns(offset, pairs)
    assert table.shape == (2, 4, 4, 32, 2, 2, 2)
    # Lane 4 g + c of step 1 of tile 3, rows g and g + 8: tokens 4 (g % 2) + g // 2 and 8 more.
    lane, first = 4 * 5 + 2, 2 * 8 + 2 * 1
    for half, token in enumerate((3 * 16 + 6, 3 * 16 + 14)):
        turns = offset[token, pairs[1, first : first + 2].long()].half()
        assert torch.equal(table[1, 3, 1, lane, half], turns.T)
    assert offset_turns(offset, pairs) is table
    assert offset_turns(offset.clone(), pairs) is not table
    assert offset_turns(offset, pairs) is table  # whoever keeps both tensors keeps it


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dim", [4, 8])
@pytest.mark.parametrize("rows", [1, 4, 5, 8, 16])
@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("key_sums", [True, False])
def test_every_variant_fits_into_shared_memory(
    head_dim: int, dim: int, rows: int, rope: bool, key_sums: bool
) -> None:
    variant = AttendVariant(head_dim, dim, rows, 32, 32, rope=rope, key_sums=key_sums)
    assert variant.shared_bytes <= MOST_SHARED_BYTES
    assert (variant.chunk > 0) == rope and variant.chunk % (variant.tiles * variant.warps // 4) == 0
    assert rows <= variant.padded_rows and variant.warps % 4 == 0


def test_it_is_chosen_on_a_gpu_and_says_what_it_does_not_read() -> None:
    assert select("attend_codes", Case().layout, "cuda").kernel.name == "cuda"
    for case, message in (
        (Case(head_dim=80), "head dim 80 is none of (64, 128)"),
        (Case(dim=2), "subvectors of 2 channels in 1 stages"),
        (Case(dim=8, stages=2), "in 2 stages"),
    ):
        refused = select("attend_codes", case.layout, "cuda").refused["attend_codes.cuda"]
        assert message in refused
    refused = select("attend_codes", Case().layout, "cpu").refused["attend_codes.cuda"]
    assert refused == "runs on cuda, not on cpu"
