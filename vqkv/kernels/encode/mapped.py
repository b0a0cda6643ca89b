"""States to bytes at once: everything linear before the codes, the codes, and their packing."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vqkv.errors import StateError
from vqkv.kernels.encode.joint import Coupling
from vqkv.kernels.select import Selection, select
from vqkv.layouts import Layout


class Maps(NamedTuple):
    """What stands between states and their codes.

    Subvectors are those of `(x − mean) matrix + source source_matrix + offset`, n = M / H · d
    channels of a head, side by side.

    Attributes:
        mean: `[H, D]`.
        matrix: `[H, D, n]`.
        source_matrix: `[H, D, n]`; None where no other states are needed.
        offset: `[H, n]`.
    """

    mean: torch.Tensor
    matrix: torch.Tensor
    source_matrix: torch.Tensor | None
    offset: torch.Tensor

    def __call__(self, x: torch.Tensor, source: torch.Tensor | None) -> torch.Tensor:
        """What is coded of states `[N, H, D]`, `[N, H, n]` in fp32."""
        mapped = torch.einsum("nhd,hde->nhe", x.float() - self.mean, self.matrix) + self.offset
        if self.source_matrix is not None:
            assert source is not None, "the caller sees to it"
            mapped = mapped + torch.einsum("nhd,hde->nhe", source.float(), self.source_matrix)
        return mapped


class MappedCodes(NamedTuple):
    """What `encode_mapped` takes beside a stream's states.

    Attributes:
        maps: of each head, fp32.
        codewords: `[M, 1, K, d]`, K ≤ 256, those of a head side by side.
        coupled: what errors of a head's channels do to each other; None to look for each group's
            nearest codeword.
        sweeps, width: as `encode_joint` takes them; 1 without a coupling.
    """

    maps: Maps
    codewords: torch.Tensor
    coupled: Coupling | None
    sweeps: int
    width: int


def encode_mapped(
    x: torch.Tensor,
    source: torch.Tensor | None,
    maps: Maps,
    codewords: torch.Tensor,
    coupled: Coupling | None,
    sweeps: int = 1,
    width: int = 1,
) -> torch.Tensor:
    """Codes `[N, H, M / H]` (uint8) of states `[N, H, D]` of any floating type.

    Args:
        x: the states.
        source: states that `maps.source_matrix` maps, where there is one.
        maps, codewords, coupled, sweeps, width: see `MappedCodes`.

    Raises:
        StateError: other states without a map of them, or the other way round.
    """
    if (source is None) != (maps.source_matrix is None):
        needed = "no" if maps.source_matrix is None else "some"
        given = "none are" if source is None else "some are"
        raise StateError(f"the maps need {needed} other states, {given} given")
    books, _, size, dim = codewords.shape
    kernel = selection(Layout.of_codebook(books, 1, size, dim, len(maps.mean)), x.device).kernel
    codes: torch.Tensor = kernel(x, source, maps, codewords, coupled, sweeps, width)
    return codes


def selection(layout: Layout, device: torch.device) -> Selection:
    """The kernel for a layout. Raises KernelError where none takes it."""
    return select("encode_mapped", layout, device)
