"""Codes of a layer's heads chosen together, in a metric that couples errors of heads."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vqkv.errors import StateError
from vqkv.kernels.select import select
from vqkv.layouts import Layout


def encode_heads(
    x: torch.Tensor, codewords: torch.Tensor, coupling: torch.Tensor, sweeps: int
) -> torch.Tensor:
    """Codes `[N, M, 1]` (int32) of vectors `[N, M, d]` under codebooks `[M, 1, K, d]`.

    A sweep goes through the heads of every set and gives each the codewords nearest to its
    `target`, errors of heads that have not been coded yet being 0.

    Args:
        x: fp32; a head's groups are side by side, and a set's heads.
        codewords: fp32 or fp16.
        coupling: `[B, h, n, h, n]` of B sets of h heads of n channels, 0 between channels of one
            head. Kernels may round it to fp16.
        sweeps: at least 1.

    Raises:
        StateError: shapes that do not fit each other.
    """
    books, stages, size, dim = codewords.shape
    sets, heads, width = coupling.shape[:3] if coupling.ndim == 5 else (0, 0, 0)
    fits = (
        stages == 1
        and sets * heads * width == books * dim
        and width % dim == 0
        and tuple(coupling.shape[3:]) == (heads, width)
        and tuple(x.shape[1:]) == (books, dim)
    )
    if not fits:
        raise StateError(
            "x is [N, M, d], codewords [M, 1, K, d] and the coupling [B, h, n, h, n] with "
            f"B h n = M d; given {list(x.shape)}, {list(codewords.shape)} and "
            f"{list(coupling.shape)}"
        )
    layout = Layout.of_codebook(books, stages, size, dim, sets * heads)
    kernel = select("encode_heads", layout, x.device).kernel
    codes: torch.Tensor = kernel(x, codewords, coupling, sweeps)
    return codes


def head_by_head(
    coupling: torch.Tensor, subspaces: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of the first head of every set, the second and so on: subvectors, `[B · M / H]`, and what
    heads of the set push them by, `[B, h n, n]`."""
    sets, heads = coupling.shape[:2]
    places = torch.arange(subspaces, device=coupling.device).view(sets, heads, -1)
    for head in range(heads):
        yield places[:, head].flatten(), coupling[:, :, :, head].flatten(1, 2).float()


def target(
    x: torch.Tensor, errors: torch.Tensor, own: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """What codewords of a head of each set are to be near to, `[N, B · M / H, d]`.

    `x` and `errors` are `[N, M, d]`, `own` and `columns` of `head_by_head`.
    """
    by_set = errors.reshape(len(x), *columns.shape[:2])
    # By the other heads of the set: a head's own block is 0.
    pushed = torch.einsum("nbi,bij->nbj", by_set, columns)
    return x[:, own] - pushed.reshape(len(x), len(own), x.shape[2])
