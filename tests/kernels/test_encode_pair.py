from __future__ import annotations

import pytest
import torch

from tests.kernels.test_encode_decode import able, make
from vqkv.errors import KernelError
from vqkv.kernels import recording, select, using
from vqkv.kernels.encode import encode
from vqkv.kernels.encode.pair import encode_pair
from vqkv.layouts import Layout


@pytest.mark.parametrize("vectors", [0, 3, 70])
@pytest.mark.parametrize("kernel", [name for name in ("naive", "triton") if name in able("encode")])
def test_each_stream_gets_its_own_codes(kernel: str, vectors: int) -> None:
    keys, key_books = make((vectors, 3, 2, 16, 4))
    values, value_books = make((vectors, 5, 1, 37, 8), seed=1)
    with using(encode_pair=kernel), recording() as ran:
        found = encode_pair(keys, key_books, values, value_books)
    assert ran[0] == f"encode_pair.{kernel}"
    for codes, x, books in zip(found, (keys, values), (key_books, value_books), strict=True):
        assert codes.dtype == torch.uint8
        assert torch.equal(codes.int(), encode(x, books))


def test_more_codewords_than_a_byte_names_are_refused() -> None:
    x, books = make((2, 1, 1, 257, 2))
    with pytest.raises(KernelError, match="values: a byte cannot name one of 257"):
        encode_pair(x, books[:, :, :16], x, books)


@pytest.mark.skipif("triton" not in able("encode"), reason="Triton is not installed")
def test_it_compiles_as_one_graph() -> None:
    keys, books = make((3, 3, 2, 16, 4))
    layouts = (Layout.of_codebook(*books.shape),) * 2
    with using(encode_pair="triton"):
        kernel = select("encode_pair", layouts, "cpu").kernel
    compiled = torch.compile(kernel.run, backend="aot_eager", fullgraph=True)
    eager = kernel.run(keys, books, keys, books)
    for expected, found in zip(eager, compiled(keys, books, keys, books), strict=True):
        assert torch.equal(expected, found)
