"""Codes of a unit's groups chosen together, in a metric that couples their errors."""

from __future__ import annotations

import torch

from vqkv.errors import StateError
from vqkv.kernels.select import select
from vqkv.layouts import Layout


def encode_joint(
    x: torch.Tensor, codewords: torch.Tensor, metric: torch.Tensor, sweeps: int
) -> torch.Tensor:
    """Codes `[N, M, 1]` (int32) of vectors `[N, M, d]` under codebooks `[M, 1, K, d]`.

    U units have M / U groups each, side by side. A sweep goes through the groups of every unit and
    gives each the codeword nearest to `x_g − Σ_{h≠g} e_h M_hg`, `e_h` being the errors of the
    others so far, 0 at first: the best one for `eᵀ M e` as they are, where `M_gg = I`.

    Args:
        x: fp32.
        codewords: fp32.
        metric: M, `[U, n, n]`, n = M d / U; what it holds in the blocks of one group is not read.
        sweeps: at least 1.

    Raises:
        StateError: shapes that do not fit each other.
    """
    books, stages, size, dim = codewords.shape
    units = len(metric)
    channels = books * dim // max(1, units)
    fits = (
        stages == 1
        and units
        and books % units == 0
        and tuple(metric.shape[1:]) == (channels, channels)
        and tuple(x.shape[1:]) == (books, dim)
    )
    if not fits:
        raise StateError(
            "x is [N, M, d], codewords [M, 1, K, d] and the metric [U, n, n] with n = M d / U; "
            f"given {list(x.shape)}, {list(codewords.shape)} and {list(metric.shape)}"
        )
    layout = Layout.of_codebook(books, stages, size, dim, units)
    kernel = select("encode_joint", layout, x.device).kernel
    codes: torch.Tensor = kernel(x, codewords, metric, sweeps)
    return codes
