from __future__ import annotations

import pytest
import torch

from vqkv.errors import StateError
from vqkv.kernels import KERNELS, recording, select, using
from vqkv.kernels.decode import decode
from vqkv.kernels.encode import encode
from vqkv.kernels.encode import naive as naive_encode
from vqkv.kernels.select import Op
from vqkv.layouts import Layout

CPU = torch.device("cpu")
#: N, M, S, K, d: awkward on purpose.
SHAPES = [
    (1, 1, 1, 1, 1),
    (63, 3, 1, 16, 5),
    (17, 2, 3, 7, 4),
    (9, 5, 2, 256, 1),
    (40, 1, 8, 33, 32),
    (1100, 2, 1, 16, 2),
    (70, 1, 2, 300, 3),
]


def able(op: str) -> list[str]:
    """Kernels of an operation that run on this machine."""
    layout = Layout.of_codebook(3, 1, 16, 5)
    names = [name.removeprefix(f"{op}.") for name in KERNELS.names() if name.startswith(f"{op}.")]
    return [n for n in names if KERNELS.get(f"{op}.{n}").refuses(layout, CPU) is None]


def make(shape: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, subvectors, stages, codewords, dim = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, subvectors, dim, generator=generator)
    books = torch.randn(subvectors, stages, codewords, dim, generator=generator)
    return x, books / torch.arange(1, stages + 1).view(1, -1, 1, 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kernel", able("encode"))
def test_codes_name_the_nearest_codeword_of_each_stage(
    kernel: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x, books = make(shape)
    books = books.to(dtype)
    with using(encode=kernel), recording() as ran:
        codes = encode(x, books)
    assert ran == [f"encode.{kernel}"]
    assert codes.shape == (shape[0], shape[1], shape[2]) and codes.dtype == torch.int32
    residual = x.double()
    for stage in range(shape[2]):
        found = books[:, stage].double()[torch.arange(shape[1]), codes[..., stage].long()]
        distances = (residual.unsqueeze(2) - books[:, stage].double()).square().sum(-1)
        chosen = (residual - found).square().sum(-1)
        assert (chosen <= distances.amin(-1) + 1e-4).all()
        residual = residual - found


@pytest.mark.parametrize("dim", [2, 4, 8])
def test_a_stage_of_far_shorter_codewords(dim: int) -> None:
    """Nothing of the first stage's reaches what the second one is compared by."""
    if "triton" not in able("encode"):
        pytest.skip("Triton's interpreter is not asked for")
    x, books = make((50, 2, 2, 256, dim))
    books[:, 1] *= 1e-6
    with using(encode="triton"):
        codes = encode(x, books).long()
    left = x.double() - books[:, 0].double()[torch.arange(2), codes[..., 0]]
    words = books[:, 1].double()
    scores = torch.einsum("nmd,mkd->nmk", left, words) - words.square().sum(-1) / 2
    chosen = scores.gather(2, codes[..., 1:])[..., 0]
    lengths = left.norm(dim=-1) * words.norm(dim=-1).amax(-1)
    assert (chosen >= scores.amax(-1) - 1e-4 * lengths).all()


@pytest.mark.parametrize("kernel", able("encode"))
def test_the_lowest_code_wins_among_equals(kernel: str) -> None:
    books = torch.zeros(2, 1, 40, 3)
    books[:, :, 7:] = 1.0
    with using(encode=kernel):
        assert (encode(torch.ones(33, 2, 3), books) == 7).all()
        assert (encode(torch.zeros(33, 2, 3), books) == 0).all()


@pytest.mark.parametrize("length", [1e-3, 3e3, 1e7])
@pytest.mark.parametrize("kernel", able("encode"))
def test_vectors_of_other_lengths_than_codewords(kernel: str, length: float) -> None:
    x, books = make((50, 2, 1, 256, 4))
    x *= length
    with using(encode=kernel):
        codes = encode(x, books)
    distances = (x.double().unsqueeze(2) - books[:, 0].double()).square().sum(-1)
    chosen = distances.gather(2, codes.long())[..., 0]
    # Of a squared distance, what differs among codewords is at most about this.
    scale = x.double().norm(dim=-1) * books.norm(dim=-1).max() + books.square().sum(-1).max()
    assert (chosen - distances.amin(-1) <= 1e-5 * scale).all()


@pytest.mark.parametrize("kernel", able("encode"))
def test_one_long_codeword_costs_others_little(kernel: str) -> None:
    x, books = make((200, 2, 1, 256, 4))
    books[:, :, 17] *= 30 / books[:, :, 17].norm(dim=-1, keepdim=True)
    with using(encode=kernel):
        codes = encode(x, books)
    distances = (x.double().unsqueeze(2) - books[:, 0].double()).square().sum(-1)
    chosen = distances.gather(2, codes.long())[..., 0]
    assert (chosen - distances.amin(-1) <= 2.0**-18 * 30**2).all()


@pytest.mark.parametrize("kernel", able("encode"))
def test_codewords_encode_to_themselves(kernel: str) -> None:
    _, books = make((1, 3, 1, 50, 4))
    with using(encode=kernel):
        codes = encode(books[:, 0].transpose(0, 1), books)
    assert torch.equal(codes[..., 0].long(), torch.arange(50)[:, None].expand(50, 3))


@pytest.mark.parametrize("power", [-20, 20])
@pytest.mark.parametrize("kernel", able("encode"))
def test_units_do_not_matter(kernel: str, power: int) -> None:
    x, books = make((20, 2, 2, 30, 4))
    with using(encode=kernel):
        assert torch.equal(encode(x * 2.0**power, books * 2.0**power), encode(x, books))


@pytest.mark.parametrize("kernel", able("encode"))
def test_no_tokens_have_no_codes(kernel: str) -> None:
    _, books = make((1, 3, 2, 8, 4))
    with using(encode=kernel):
        assert encode(torch.zeros(0, 3, 4), books).shape == (0, 3, 2)
    assert decode(torch.zeros(0, 3, 2, dtype=torch.int32), books).shape == (0, 3, 4)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, books = make((63, 3, 2, 16, 5))
    with using(encode="naive"):
        whole = encode(x, books)
        monkeypatch.setattr(naive_encode, "MAX_SCORES", 100)  # two rows at a time
        assert torch.equal(encode(x, books), whole)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", able("decode"))
def test_decoding_adds_up_one_codeword_per_stage(kernel: str, shape: tuple[int, ...]) -> None:
    tokens, subvectors, stages, codewords, dim = shape
    _, books = make(shape)
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(codewords, (tokens, subvectors, stages), generator=generator)
    with using(decode=kernel), recording() as ran:
        vectors = decode(codes.to(torch.int32), books.half())
    assert ran == [f"decode.{kernel}"]
    assert vectors.dtype == torch.float32
    expected = torch.zeros(tokens, subvectors, dim)
    for n in range(tokens):
        for m in range(subvectors):
            for s in range(stages):
                expected[n, m] += books.half()[m, s, codes[n, m, s]].float()
    torch.testing.assert_close(vectors, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dim", [4, 8])
def test_outputs_larger_than_the_caches_decode_the_same(dim: int) -> None:
    if "cpu" not in able("decode"):
        pytest.skip("the package was built without a C compiler")
    books = make((1, 1, 1, 256, dim))[1]
    codes = torch.arange(2**23 // (4 * dim) + 5, dtype=torch.int32).remainder(256)[:, None, None]
    with using(decode="cpu"):
        vectors = decode(codes, books)
    assert torch.equal(vectors[:, 0], books[0, 0][codes[:, 0, 0].long()])


@pytest.mark.parametrize("wrong", [-1, 16])
def test_the_compiled_kernel_refuses_codes_that_name_no_codeword(wrong: int) -> None:
    if "cpu" not in able("decode"):
        pytest.skip("the package was built without a C compiler")
    _, books = make((1, 3, 1, 16, 5))
    codes = torch.zeros(4, 3, 1, dtype=torch.int32)
    codes[2, 1] = wrong
    with using(decode="cpu"), pytest.raises(StateError, match="codewords 0 to 15, given "):
        decode(codes, books)
    with using(decode="cpu"), pytest.raises(StateError, match="agree in M and S"):
        decode(codes[:, :2], books)


@pytest.mark.parametrize("op", ["encode", "decode"])
def test_the_compiled_kernel_is_chosen_where_it_exists(op: Op) -> None:
    best = select(op, Layout.of_codebook(3, 1, 16, 5), CPU).kernel.name
    assert best == ("cpu" if "cpu" in able(op) else "naive")
