"""Codes of a unit's groups chosen together, in a metric that couples their errors."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vqkv.errors import StateError
from vqkv.kernels.select import select
from vqkv.layouts import Layout

#: Added to a metric where a search looks ahead: errors to come are nearly free, not quite.
SLACK = 0.05

#: A metric's least eigenvalue; rounding makes some a little negative.
LOWEST = -0.5


class Coupling(NamedTuple):
    """What errors of a unit's groups do to each other, for units of n channels.

    Attributes:
        metric: M, `[U, n, n]` in fp32 or fp16; what it holds in the blocks of one group is not
            read, they are taken as ones.
        ahead: V, `[U, n, n]` in fp32, upper triangular with `V Vᵀ = M + s I`, s being `SLACK` or
            a little more. In that metric errors that are known up to channel i cost at least
            `‖Vᵀ e‖²` over the channels before i, and the others can make up for all else.
    """

    metric: torch.Tensor
    ahead: torch.Tensor


def coupling(metric: torch.Tensor, dim: int) -> Coupling:
    """Of a metric `[U, n, n]` of groups of d channels.

    Raises:
        StateError: it is far from positive definite: errors could cost less than nothing.
    """
    channels = torch.arange(metric.shape[1], device=metric.device) // dim
    eye = torch.eye(len(channels), dtype=torch.float64, device=metric.device)
    coupled = torch.where(channels[:, None] == channels, eye, metric.double())
    least = torch.linalg.eigvalsh(coupled)[:, 0]
    if not bool((least >= LOWEST).all()):
        raise StateError(
            "the metric that couples errors is not positive definite: its least eigenvalue is "
            f"{float(least.min()):.3g}"
        )
    slack = SLACK + (-least).clamp_min(0)
    # Cholesky's factor is lower triangular, of channels in the opposite order an upper one.
    factor = torch.linalg.cholesky((coupled + slack[:, None, None] * eye).flip(1, 2))
    return Coupling(metric, factor.flip(1, 2).float().contiguous())


def ahead_words(books: torch.Tensor, ahead: torch.Tensor) -> torch.Tensor:
    """Codewords `[U, G, K, d]` times their groups' own blocks of V, in fp32.

    A search that looks ahead finds the nearest one of these.
    """
    dim = books.shape[3]
    blocks = [ahead[:, i : i + dim, i : i + dim] for i in range(0, ahead.shape[1], dim)]
    return books.float() @ torch.stack(blocks, 1)


class JointLayout(NamedTuple):
    """What a kernel is chosen by: the layout of the codes, and how many choices are kept."""

    codes: Layout
    width: int


def encode_joint(
    x: torch.Tensor,
    codewords: torch.Tensor,
    coupled: Coupling,
    sweeps: int,
    width: int = 1,
) -> torch.Tensor:
    """Codes `[N, M, 1]` (int32) of vectors `[N, M, d]` under codebooks `[M, 1, K, d]`.

    U units have M / U groups each, side by side, and errors e of a unit cost `eᵀ M e`. A search
    goes through the groups once and keeps the `width` choices of codes so far that cost least, if
    errors of later groups made up for all that they can: with one of them, QuIP's rounding (arXiv
    2307.13304, section 3); with more, a sphere decoder's K-best search.

    Sweeps over the groups then give each the codeword nearest to `x_g − Σ_{h≠g} e_h M_hg`, e_h
    being the errors of the others so far: the best one for `eᵀ M e` as they are, where `M_gg = I`.

    Args:
        x: fp32.
        codewords: fp32 or fp16.
        coupled: M, n = M d / U, which kernels may round to fp16.
        sweeps: at least 1.
        width: of the search.

    Raises:
        StateError: shapes that do not fit each other.
    """
    books, stages, size, dim = codewords.shape
    units = len(coupled.metric)
    channels = books * dim // max(1, units)
    fits = (
        stages == 1
        and units
        and books % units == 0
        and tuple(coupled.metric.shape[1:]) == (channels, channels)
        and coupled.ahead.shape == coupled.metric.shape
        and tuple(x.shape[1:]) == (books, dim)
    )
    if not fits:
        raise StateError(
            "x is [N, M, d], codewords [M, 1, K, d] and the metric [U, n, n] with n = M d / U; "
            f"given {list(x.shape)}, {list(codewords.shape)} and {list(coupled.metric.shape)}"
        )
    layout = JointLayout(Layout.of_codebook(books, stages, size, dim, units), width)
    kernel = select("encode_joint", layout, x.device).kernel
    codes: torch.Tensor = kernel(x, codewords, coupled, sweeps, width)
    return codes
