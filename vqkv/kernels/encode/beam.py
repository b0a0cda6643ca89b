"""Codes of codewords that add up, found by keeping several partial sums at a time."""

from __future__ import annotations

import torch

from vqkv.errors import StateError
from vqkv.kernels.select import select
from vqkv.layouts import Layout


def encode_beam(x: torch.Tensor, codewords: torch.Tensor, width: int) -> torch.Tensor:
    """Codes `[N, M, S]` (int32) of vectors `[N, M, d]` under codebooks `[M, S, K, d]`.

    The `width` sums nearest to each vector are kept after every stage (Babenko, Lempitsky 2014).

    Raises:
        StateError: shapes that do not fit each other, or a width below 1.
    """
    books, _, _, dim = codewords.shape
    if x.shape[1:] != (books, dim):
        raise StateError(f"vectors have shape [N, {books}, {dim}], given {list(x.shape)}")
    if width < 1:
        raise StateError(f"a beam is at least 1 wide, given {width}")
    kernel = select("encode_beam", Layout.of_codebook(*codewords.shape), x.device).kernel
    codes: torch.Tensor = kernel(x.float(), codewords.float(), width)
    return codes
