from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vqkv.kernels.gpu.configs import MOST_SPLITS, split_count, word_bytes
from vqkv.kernels.gpu.shipped import SHIPPED

POSITIVE = st.integers(1, 4096)


@given(POSITIVE, POSITIVE, st.integers(1, 256), st.integers(1, 8))
def test_every_split_has_pages(programs: int, pages: int, multiprocessors: int, held: int) -> None:
    splits = split_count(programs, pages, multiprocessors, held)
    assert 1 <= splits <= min(pages, MOST_SPLITS)


def test_one_sequence_fills_the_gpu_and_many_are_not_split() -> None:
    assert 8 * split_count(8, 2048, 132, 4) >= 0.9 * 132 * 4
    assert split_count(528, 2048, 132, 4) == 1
    assert split_count(8, 32, 132, 1) == 16  # of two pages each; fifteen would have up to three


def test_words_divide_what_they_are_read_from() -> None:
    assert word_bytes(1, 32, 64) == 4
    assert word_bytes(1, 30, 64) == 2
    assert word_bytes(2, 33) == 0


def test_more_kept_values_leave_fewer_programs() -> None:
    plain, turned, wide = (
        SHIPPED[f"attend/{name}"].resident()  # type: ignore[union-attr]
        for name in ("128/d4", "128/d4/rope/key-sums", "256/d4/rope/key-sums")
    )
    assert (plain, turned, wide) == (4, 1, 1)
