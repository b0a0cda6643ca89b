from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqkv.errors import StateError
from vqkv.kernels import native, recording, using
from vqkv.kernels.pack import pack, unpack
from vqkv.layouts import Layout

LAYOUT = Layout.of_codebook(1, 1, 2, 1)


def random_codes(bits: int, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**bits, shape, generator=generator, dtype=torch.int32)


@given(
    st.integers(0, 16),
    st.lists(st.integers(0, 4), max_size=2),
    st.integers(0, 40),
    st.integers(0, 99),
)
def test_codes_survive(bits: int, rows: list[int], count: int, seed: int) -> None:
    codes = random_codes(bits, (*rows, count), seed)
    packed = pack(codes, bits, LAYOUT)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*rows, -(-count * bits // 8))
    back = unpack(packed, bits, count, LAYOUT)
    assert back.dtype == torch.int32
    assert torch.equal(back, codes)


@pytest.mark.parametrize("bits", range(17))
def test_bits_lie_least_significant_first(bits: int) -> None:
    codes = random_codes(bits, (11,))
    stream = sum(int(code) << (bits * index) for index, code in enumerate(codes))
    expected = stream.to_bytes(-(-11 * bits // 8), "little")
    assert bytes(pack(codes, bits, LAYOUT).tolist()) == expected


@pytest.mark.parametrize("bits", range(1, 17))
def test_the_largest_and_the_smallest_code_fit(bits: int) -> None:
    codes = torch.tensor([2**bits - 1, 0, 2**bits - 1], dtype=torch.int32)
    assert torch.equal(unpack(pack(codes, bits, LAYOUT), bits, 3, LAYOUT), codes)


@pytest.mark.parametrize("bits", range(16))
def test_codes_that_do_not_fit_are_refused(bits: int) -> None:
    with pytest.raises(StateError, match=f"run from 0 to {2**bits}; {bits} bits hold 0 to "):
        pack(torch.tensor([0, 2**bits], dtype=torch.int32), bits, LAYOUT)
    with pytest.raises(StateError, match="run from -1 to 0"):
        pack(torch.tensor([-1, 0], dtype=torch.int32), bits, LAYOUT)


@pytest.mark.parametrize("bits", [-1, 17])
def test_widths_that_do_not_exist_are_refused(bits: int) -> None:
    with pytest.raises(StateError, match=f"0 to 16 bits, given {bits}"):
        pack(torch.zeros(3, dtype=torch.int32), bits, LAYOUT)
    with pytest.raises(StateError, match=f"0 to 16 bits, given {bits}"):
        unpack(torch.zeros(3, dtype=torch.uint8), bits, 3, LAYOUT)


def test_another_number_of_bytes_is_refused() -> None:
    with pytest.raises(StateError, match="3 codes of 11 bits take 5 bytes, given 4"):
        unpack(torch.zeros(2, 4, dtype=torch.uint8), 11, 3, LAYOUT)


@pytest.mark.parametrize("bits", [4, 8, 11, 16])
def test_slices_and_transposed_tensors(bits: int) -> None:
    codes = random_codes(bits, (6, 5, 4))
    packed = pack(codes.transpose(0, 1), bits, LAYOUT)
    assert torch.equal(packed, pack(codes.transpose(0, 1).contiguous(), bits, LAYOUT))
    # As a segment lies in a token: behind an odd number of other bytes.
    inside = torch.cat([torch.full((5, 6, 1), 255, dtype=torch.uint8), packed], -1)[..., 1:]
    assert torch.equal(unpack(inside, bits, 4, LAYOUT), codes.transpose(0, 1))
    assert torch.equal(unpack(inside[:1, :1], bits, 4, LAYOUT), codes.transpose(0, 1)[:1, :1])


def test_the_naive_kernels_run_when_asked_for() -> None:
    with using(pack="naive", unpack="naive"), recording() as ran:
        unpack(pack(random_codes(3, (4,)), 3, LAYOUT), 3, 4, LAYOUT)
    assert ran == ["pack.naive", "unpack.naive"]


@pytest.mark.skipif(not native.available(), reason="the package was built without a C compiler")
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 15, 16, 129])
@pytest.mark.parametrize("bits", range(17))
def test_the_compiled_kernels_equal_the_naive_ones(bits: int, count: int) -> None:
    codes = random_codes(bits, (3, 5, count))
    with using(pack="naive", unpack="naive"):
        packed = pack(codes, bits, LAYOUT)
    with using(pack="cpu", unpack="cpu"), recording() as ran:
        assert torch.equal(pack(codes, bits, LAYOUT), packed)
        inside = torch.nn.functional.pad(packed, (2, 1), value=255)[..., 2:-1]
        assert torch.equal(unpack(inside, bits, count, LAYOUT), codes)
    assert ran == ["pack.cpu", "unpack.cpu"]


@pytest.mark.skipif(not native.available(), reason="the package was built without a C compiler")
def test_threads_pack_the_same() -> None:
    codes = random_codes(5, (4096, 9))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with using(pack="cpu", unpack="cpu"):
            packed = pack(codes, 5, LAYOUT)
            assert torch.equal(unpack(packed, 5, 9, LAYOUT), codes)
    finally:
        torch.set_num_threads(threads)
    with using(pack="naive"):
        assert torch.equal(pack(codes, 5, LAYOUT), packed)
