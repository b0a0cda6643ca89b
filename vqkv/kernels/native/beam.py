"""Beam search by the compiled kernel."""

from __future__ import annotations

import torch

from vqkv.kernels.native.library import in_ranges, level_number, library

#: Rows below which another thread costs more than it gives.
MIN_ROWS = 16

#: A multiple of the lanes of any vector of the C code.
LANES = 16

#: More than any score.
FAR = 1e30


def encode_beam(x: torch.Tensor, codewords: torch.Tensor, width: int) -> torch.Tensor:
    """Codes `[N, M, S]` (int32), all on the CPU.

    `‖x − Σ_s c_s‖² − ‖x‖² = Σ_s (‖c_s‖² − 2⟨x, c_s⟩) + Σ_{t<s} 2⟨c_t, c_s⟩`: the kernel adds up
    products of codewords with each other, which are made here, and sees no residual.
    """
    x, words = x.float().contiguous(), codewords.float()
    books, stages, size, dim = words.shape
    turned = _padded(-2 * words.mT, 0).contiguous()  # [M, S, d, room]
    norms = _padded(words.square().sum(-1), FAR).contiguous()  # [M, S, room]
    products = torch.cat(
        [
            _padded(2 * words[:, :stage].flatten(1, 2) @ words[:, stage].mT, 0)
            for stage in range(stages)
        ],
        1,
    ).contiguous()  # [M, K (0 + 1 + … + S − 1), room]
    codes = torch.empty(len(x), books, stages, dtype=torch.int32)

    def run(begin: int, end: int) -> int:
        failure: int = library().vqkv_beam(
            level_number(),
            *(x.data_ptr(), turned.data_ptr(), norms.data_ptr(), products.data_ptr()),
            *(books, stages, size, norms.shape[2], dim, width, begin, end),
            codes.data_ptr(),
        )
        return failure

    if any(in_ranges(len(x), MIN_ROWS, run)):
        raise MemoryError("no memory for the sums of a block of vectors")
    return codes


def product_bytes(stages: int, size: int) -> int:
    """Of the products of one codebook's codewords with those of the stages before."""
    return 4 * _room(size) * size * (stages * (stages - 1) // 2)


def _room(size: int) -> int:
    return -(-size // LANES) * LANES


def _padded(x: torch.Tensor, value: float) -> torch.Tensor:
    """The last axis, which is of codes, made up to a multiple of LANES."""
    return torch.nn.functional.pad(x, (0, _room(x.shape[-1]) - x.shape[-1]), value=value)
