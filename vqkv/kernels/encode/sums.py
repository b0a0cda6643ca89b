"""Codes of the nearest sum of two codewords, any one of a codebook and any one of another."""

from __future__ import annotations

import torch

from vqkv.errors import StateError
from vqkv.kernels.select import select
from vqkv.layouts import Layout


def encode_sums(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Codes `[N, M]` (int32) of vectors `[N, M, d]` under two codebooks `[M, K, d]` each.

    The code of `c_a + c'_b` is `a · K + b`; the lowest wins among equals. Products with the vector
    add up, so that K² sums cost 2 K of them.

    Raises:
        StateError: shapes that do not fit each other.
    """
    if first.shape != second.shape or x.shape[1:] != (first.shape[0], first.shape[2]):
        raise StateError(
            "x is [N, M, d] and both codebooks are [M, K, d]; given "
            f"{list(x.shape)}, {list(first.shape)} and {list(second.shape)}"
        )
    books, size, dim = first.shape
    kernel = select("encode_sums", Layout.of_codebook(books, 2, size, dim), x.device).kernel
    codes: torch.Tensor = kernel(*sum_terms(x, first, second))
    return codes


def sum_terms(
    x: torch.Tensor, first: torch.Tensor, second: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`−2⟨x, c_a⟩` and `−2⟨x, c'_b⟩` `[N, M, K]` each, and `‖c_a + c'_b‖²` `[M, K, K]`.

    They add up to `‖x − c_a − c'_b‖² − ‖x‖²`.
    """
    norms = [words.square().sum(-1) for words in (first, second)]
    sizes = norms[0].unsqueeze(2) + norms[1].unsqueeze(1) + 2 * first @ second.mT
    products = [-2 * torch.einsum("nmd,mkd->nmk", x, words) for words in (first, second)]
    return products[0], products[1], sizes
