"""States to bytes in one launch, against maps and a search one after the other."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_encode_decode import able
from vqkv.errors import KernelError, StateError
from vqkv.kernels.decode import decode
from vqkv.kernels.encode.joint import Coupling, coupling
from vqkv.kernels.encode.mapped import Maps, encode_mapped, selection
from vqkv.kernels.select import recording, using
from vqkv.layouts import Layout

KERNELS = [name for name in able("encode_mapped") if name != "naive"]
TRITON = pytest.mark.skipif("triton" not in KERNELS, reason="Triton is not installed")
#: N, H, D, groups, K, d: n may differ from D, and heads may be of any width.
SHAPES = [(1, 1, 16, 4, 16, 4), (131, 3, 20, 5, 33, 4), (70, 2, 64, 8, 256, 8), (5, 1, 24, 3, 5, 3)]


def case(
    shape: tuple[int, ...], scale: float = 1.0, jointly: bool = False
) -> tuple[torch.Tensor, torch.Tensor, Maps, torch.Tensor, Coupling | None]:
    """States, other states, maps, codewords, and a coupling."""
    tokens, heads, head_dim, groups, size, dim = shape
    generator = torch.Generator().manual_seed(tokens)
    channels = groups * dim

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    maps = Maps(
        mean=10 * scale * normal(heads, head_dim),
        matrix=normal(heads, head_dim, channels) / head_dim**0.5,
        source_matrix=normal(heads, head_dim, channels) / head_dim**0.5,
        offset=scale * normal(heads, channels),
    )
    noise = normal(heads, channels, channels)
    metric = torch.eye(channels) + 0.25 * (noise + noise.mT) / channels**0.5
    return (
        scale * (normal(tokens, heads, head_dim) + 10),
        scale * normal(tokens, heads, head_dim),
        maps,
        scale * normal(heads * groups, 1, size, dim),
        coupling(metric, dim) if jointly else None,
    )


@pytest.mark.parametrize("jointly", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_agree_but_for_near_ties(
    kernel: str, shape: tuple[int, ...], scale: float, jointly: bool
) -> None:
    x, source, maps, words, coupled = case(shape, scale, jointly)
    given = (x, source, maps, words, coupled, 3 if jointly else 1)
    with using(encode_mapped="naive", encode="naive", encode_joint="naive"):
        expected = encode_mapped(*given)
    with using(encode_mapped=kernel), recording() as ran:
        found = encode_mapped(*given)
    assert ran[0] == f"encode_mapped.{kernel}"
    assert found.dtype == torch.uint8 and found.shape == (*x.shape[:2], shape[3])
    assert (expected == found).float().mean() > 0.99
    mapped = maps(x, source).flatten(1).unflatten(1, (-1, shape[5]))

    def distance(codes: torch.Tensor) -> float:
        return float((decode(codes.int().flatten(1)[..., None], words) - mapped).square().sum())

    assert distance(found) == pytest.approx(distance(expected), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_states_of_any_type_and_strides_are_read(kernel: str, dtype: torch.dtype) -> None:
    x, _, maps, words, _ = case((70, 2, 16, 4, 16, 4))
    maps = maps._replace(source_matrix=None)
    by_head = x.to(dtype).transpose(0, 1).contiguous().transpose(0, 1)
    with using(encode_mapped="naive", encode="naive"):
        expected = encode_mapped(by_head.float(), None, maps, words, None, 1)
    with using(encode_mapped=kernel):
        for given in (by_head, by_head.mT.contiguous().mT):
            found = encode_mapped(given, None, maps, words, None, 1)
            assert (expected == found).float().mean() > 0.99


@TRITON
def test_wide_heads_are_refused() -> None:
    x, source, maps, words, _ = case((3, 1, 132, 33, 16, 4))
    with using(encode_mapped="triton"), pytest.raises(KernelError, match="132 channels of a head"):
        encode_mapped(x, source, maps, words, None)


@pytest.mark.parametrize("needed", [True, False])
def test_other_states_and_their_map_come_together(needed: bool) -> None:
    x, source, maps, words, _ = case((3, 1, 16, 4, 16, 4))
    given = None if needed else source
    maps = maps if needed else maps._replace(source_matrix=None)
    with pytest.raises(StateError, match="the maps need"):
        encode_mapped(x, given, maps, words, None)


@TRITON
def test_it_compiles_as_one_graph() -> None:
    x, source, maps, words, _ = case((5, 2, 16, 4, 16, 4))
    with using(encode_mapped="triton"):
        run = selection(Layout.of_codebook(8, 1, 16, 4, units=2), torch.device("cpu")).kernel.run
    compiled = torch.compile(
        lambda *states: run(*states, maps, words, None, 1, 1) + 1,
        backend="aot_eager",
        fullgraph=True,
    )
    assert torch.equal(compiled(x, source), run(x, source, maps, words, None, 1, 1) + 1)
