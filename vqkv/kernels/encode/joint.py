"""Codes of a unit's groups chosen together, in a metric that couples their errors."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vqkv.errors import StateError
from vqkv.kernels.select import select
from vqkv.layouts import Layout


class JointLayout(NamedTuple):
    """What a kernel is chosen by: the layout of the codes, and how many choices are kept."""

    codes: Layout
    width: int


def encode_joint(
    x: torch.Tensor,
    codewords: torch.Tensor,
    metric: torch.Tensor,
    sweeps: int,
    width: int = 1,
) -> torch.Tensor:
    """Codes `[N, M, 1]` (int32) of vectors `[N, M, d]` under codebooks `[M, 1, K, d]`.

    U units have M / U groups each, side by side. A sweep goes through the groups of every unit and
    gives each the codeword nearest to `x_g − Σ_{h≠g} e_h M_hg`, `e_h` being the errors of the
    others so far, 0 at first: the best one for `eᵀ M e` as they are, where `M_gg = I`.

    With a `width` of more than 1 a beam search comes first: it goes through the groups once and
    keeps the `width` best codes of those so far, errors of the others being 0.

    Args:
        x: fp32.
        codewords: fp32 or fp16.
        metric: M, `[U, n, n]`, n = M d / U, in fp32 or fp16, which kernels may round it to; what it
            holds in the blocks of one group is not read.
        sweeps: at least 1.
        width: of the beam search; 1 for none.

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
    layout = JointLayout(Layout.of_codebook(books, stages, size, dim, units), width)
    kernel = select("encode_joint", layout, x.device).kernel
    codes: torch.Tensor = kernel(x, codewords, metric, sweeps, width)
    return codes
