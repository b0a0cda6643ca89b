"""Codes to vectors by the compiled kernel."""

from __future__ import annotations

import torch

from vqkv.errors import StateError
from vqkv.kernels.native.library import in_ranges, library

#: Rows below which another thread costs more than it gives.
MIN_ROWS = 256


def decode(codes: torch.Tensor, codewords: torch.Tensor) -> torch.Tensor:
    """Vectors `[N, M, d]` (fp32) of `codes` `[N, M, S]` under `codewords` `[M, S, K, d]`.

    Raises:
        StateError: shapes that do not fit each other, or a code that names no codeword.
    """
    if codes.ndim != 3 or codewords.ndim != 4 or codes.shape[1:] != codewords.shape[:2]:
        raise StateError(
            "codes [N, M, S] and codewords [M, S, K, d] agree in M and S, given "
            f"{list(codes.shape)} and {list(codewords.shape)}"
        )
    books, _, _, dim = codewords.shape
    vectors = torch.empty(codes.shape[0], books, dim, dtype=torch.float32, device=codes.device)
    decode_into(vectors, codes.int().contiguous(), codewords.float().contiguous())
    return vectors


def decode_into(vectors: torch.Tensor, codes: torch.Tensor, codewords: torch.Tensor) -> None:
    """Write `vectors` (fp32) of codes (int32) under codewords (fp32), all contiguous.

    Raises:
        StateError: a code that names no codeword.
    """

    def run(begin: int, end: int) -> int:
        failure: int = library().vqkv_decode(
            *(codes.data_ptr(), codewords.data_ptr(), *codewords.shape, begin, end),
            vectors.data_ptr(),
        )
        return failure

    if any(in_ranges(codes.shape[0], MIN_ROWS, run)):
        raise StateError(
            f"codes name codewords 0 to {codewords.shape[2] - 1}, "
            f"given {int(codes.min())} to {int(codes.max())}"
        )
