"""Tokens coded by a trellis to pairs: the compiled kernel against the naive one, and by hand."""

from __future__ import annotations

import pytest
import torch

from vqkv.errors import StateError
from vqkv.kernels import native
from vqkv.kernels.decode.trellis import Strings, decode_trellis
from vqkv.kernels.select import recording, using

needs_c = pytest.mark.skipif(not native.available(), reason="no C compiler")
KERNELS = ["naive", pytest.param("cpu", marks=needs_c)]


def case(tokens: int, pairs: int, memory: int) -> tuple[Strings, torch.Tensor, torch.Tensor]:
    """Tokens of 0 to 9 bytes, side by side."""
    generator = torch.Generator().manual_seed(tokens + memory)
    counts = torch.randint(10, (tokens,), generator=generator)
    codes = torch.randint(256, (int(counts.sum()),), generator=generator, dtype=torch.int32)
    shares = torch.rand(10, pairs, generator=generator)
    bits = 8 * torch.arange(10).unsqueeze(1)
    ends = (shares.cumsum(1) / shares.sum(1, keepdim=True) * bits).long()
    ends[:, -1] = bits[:, 0]
    units = torch.rand(10, pairs, 2, generator=generator)
    table = torch.randn(1 << memory, 2, generator=generator)
    return Strings(codes, counts.cumsum(0) - counts, counts, ends), units, table


@needs_c
@pytest.mark.parametrize("memory", [4, 12, 16])
def test_kernels_agree(memory: int) -> None:
    given = case(300, 7, memory)
    found = {}
    for kernel in ("naive", "cpu"):
        with using(decode_trellis=kernel), recording() as ran:
            found[kernel] = decode_trellis(*given)
        assert ran == [f"decode_trellis.{kernel}"]
    assert torch.equal(found["naive"], found["cpu"])


@pytest.mark.parametrize("kernel", KERNELS)
def test_states_are_bits_in_a_row_of_their_own_token(kernel: str) -> None:
    codes = torch.tensor([0b10110011, 0b01011100, 0b11111111], dtype=torch.int32)
    ends = torch.tensor([[0, 0], [3, 8], [5, 16]])
    strings = Strings(codes, torch.tensor([0, 2, 3]), torch.tensor([2, 1, 0]), ends)
    table = torch.arange(16.0).unsqueeze(1).expand(-1, 2)
    units = torch.ones(3, 2, 2)
    units[0] = 0
    with using(decode_trellis=kernel):
        found = decode_trellis(strings, units, table)[..., 0]
    # 0110 ends with the fifth bit, 1100 with the sixteenth; of the next token 111, then 1111.
    assert found.tolist() == [[0b0110, 0b1100], [0b111, 0b1111], [0, 0]]


@needs_c
def test_tokens_outside_of_the_codes_are_refused() -> None:
    strings, units, table = case(5, 3, 4)
    for changed in (
        strings._replace(offsets=strings.offsets + 100),
        strings._replace(offsets=strings.offsets - 100),
        strings._replace(counts=strings.counts + 10),
    ):
        with using(decode_trellis="cpu"), pytest.raises(StateError, match="outside of the codes"):
            decode_trellis(changed, units, table)


def test_shapes_that_do_not_fit_are_refused() -> None:
    strings, units, table = case(5, 3, 4)
    for changed in ((strings, units[:, :2], table), (strings, units, table[:-1])):
        with pytest.raises(StateError, match="do not fit"):
            decode_trellis(*changed)
