"""Units whose sums `u_a + i u_b` are codewords, and how a stage of them is learned: annealed EM.

CommVQ (arXiv 2506.18879, section 3.2). Pairs of neighbouring channels are complex numbers; a stage
has `size` units `[M, size, d]`, of which any two make a codeword, the second turned by a right
angle. All pairs share a code.
"""

from __future__ import annotations

import torch

from vqkv.codebooks.base import Health, last_gain, usage_entropy
from vqkv.codebooks.em import EMConfig, temperatures
from vqkv.kernels.encode.sums import encode_sums, sum_terms
from vqkv.kernels.encode.sums_naive import score_blocks

#: Samples of a hard step at a time.
HARD_ROWS = 2048


def turned(x: torch.Tensor) -> torch.Tensor:
    """`i x`: pairs (x, y) of neighbouring channels become (−y, x)."""
    pairs = x.unflatten(-1, (-1, 2))
    return torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)


def codeword(codes: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """`u_a + i u_b` `[N, M, d]` of codes `[N, M]` under units `[M, size, d]`."""
    first, second = codes.long() // units.shape[1], codes.long() % units.shape[1]
    subspace = torch.arange(units.shape[0], device=units.device)
    return units[subspace, first] + turned(units)[subspace, second]


def addends(units: torch.Tensor) -> torch.Tensor:
    """What two indices a stage add up, `u` and `i u` in turn: `[M, 2 S, size, d]`, in fp32.

    Of units `[M, S, size, d]`.
    """
    units = units.float()
    return torch.stack([units, turned(units)], 2).flatten(1, 2)


def nearest(x: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """Codes `[N, M]` (int32) of the nearest `u_a + i u_b`, the lowest among equals."""
    return encode_sums(x, units, turned(units))


def learn_stage(
    x: torch.Tensor,
    weights: torch.Tensor,
    size: int,
    em: EMConfig,
    *,
    draw: int,
    hard: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, Health]:
    """Units of one stage: soft iterations on draws, then hard ones on all samples.

    While assignment is soft, a draw says about as much as all samples do. Hard iterations never
    raise the distortion, so the last one's units are the best of them.

    Args:
        x: samples, or what earlier stages leave of them, `[N, M, d]`.
        weights: `[N, M]`.
        size: units.
        em: soft iterations and their temperatures, in distortions of a first draw at the start.
        draw: samples of a soft iteration, drawn anew for each.
        hard: hard iterations.
        generator: of all that is random.

    Returns:
        Units `[M, size, d]`, codes `[N, M]` of the samples, and a health whose inertia is that of
        the units before and after each hard iteration.
    """

    def drawn(count: int) -> torch.Tensor:
        return torch.randperm(len(x), generator=generator)[:count].to(x.device)

    start = x[drawn(size)].transpose(0, 1)
    # u_a + i u_b is a sample when both are about half of it turned back by 45 degrees.
    units = (start - turned(start)) / 2
    rows = drawn(draw)
    scale = distortion(x[rows], nearest(x[rows], units), units, weights[rows])
    for temperature in temperatures(em):
        units = m_step(*soft_step(x[rows], units, weights[rows], temperature * scale), units)
        rows = drawn(draw)
    codes = nearest(x, units)
    inertia = [distortion(x, codes, units, weights)]
    for _ in range(hard):
        units = m_step(*hard_step(x, codes, units, weights), units)
        codes = nearest(x, units)
        inertia.append(distortion(x, codes, units, weights))
    counts = torch.zeros(units.shape[0], size**2, dtype=torch.float64)
    used = codes.t().long().cpu()
    counts.scatter_add_(1, used, torch.ones_like(used, dtype=torch.float64))
    # Sums of pairs are not learned one by one, so unused ones are not dead.
    health = Health(tuple(inertia), usage_entropy(counts), 0, 0, last_gain(inertia))
    return units, codes, health


def distortion(
    x: torch.Tensor, codes: torch.Tensor, units: torch.Tensor, weights: torch.Tensor
) -> float:
    """Mean squared distance of `[N, M, d]` to the codewords of `[N, M]`, over all subspaces."""
    errors = (x - codeword(codes, units)).square().sum(-1).double()
    return float(((errors * weights).sum(0) / weights.sum(0).clamp_min(1e-30)).mean())


def soft_step(
    x: torch.Tensor, units: torch.Tensor, weights: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """E step `p ∝ exp(−‖x − u_a − i u_b‖² / T)`: what `m_step` needs.

    Returns:
        Mass `[M, size, size]` of each codeword, and `Σ_b s_ab − i Σ_a s_ab` `[M, size, d]` of the
        sums s of its samples.
    """
    size = units.shape[1]
    mass = x.new_zeros(units.shape[0], size, size, dtype=torch.float64)
    sums = torch.zeros_like(units, dtype=torch.float64)
    start = 0
    for scores in score_blocks(*sum_terms(x, units, turned(units))):
        rows = slice(start, start + len(scores))
        p = torch.softmax(-scores.flatten(2) / max(temperature, 1e-30), -1)
        p = (p * weights[rows].unsqueeze(-1).float()).unflatten(2, (size, size))
        block = x[rows].transpose(0, 1)
        mass += p.sum(0).double()
        first, second = (p.sum(axis).permute(1, 2, 0) for axis in (3, 2))
        sums += (first @ block - turned(second @ block)).double()
        start = rows.stop
    return mass, sums


def hard_step(
    x: torch.Tensor, codes: torch.Tensor, units: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `soft_step`, with each sample at its code of `[N, M]` alone."""
    size = units.shape[1]
    at, w = codes.t().long(), weights.t()
    mass = w.new_zeros(units.shape[0], size**2).scatter_add_(1, at, w)
    sums = torch.zeros_like(units, dtype=torch.float64)
    # By products with what codes choose: scattering every channel takes several times as long.
    for start in range(0, len(x), HARD_ROWS):
        rows = slice(start, start + HARD_ROWS)
        block, near = x[rows].transpose(0, 1), at[:, rows].unsqueeze(2)
        share = w[:, rows].float().unsqueeze(2)
        first, second = (
            block.new_zeros(*block.shape[:2], size).scatter_(2, index, share).mT
            for index in (near // size, near % size)
        )
        sums += (first @ block - turned(second @ block)).double()
    return mass.unflatten(1, (size, size)), sums


def m_step(mass: torch.Tensor, sums: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """The units that minimise `Σ_ab S_ab |m_ab − u_a − i u_b|²`; no mass leaves a unit as it was.

    Normal equations, alike for every pair: `(diag(r + q) + i (S − Sᵀ)) u = Σ_b s_ab − i Σ_a s_ab`,
    r and q the row and column sums of S.
    """
    rows = mass.sum(2) + mass.sum(1)
    matrix = torch.complex(torch.diag_embed(rows), mass - mass.transpose(1, 2))
    # Keeps units without mass in place, and the system regular.
    slack = 1e-9 * rows.mean(1).clamp_min(1e-30)
    eye = torch.eye(mass.shape[1], dtype=matrix.dtype, device=matrix.device)
    old = torch.view_as_complex(units.double().unflatten(-1, (-1, 2)).contiguous())
    right = torch.view_as_complex(sums.unflatten(-1, (-1, 2)).contiguous())
    solved = torch.linalg.solve(
        matrix + slack[:, None, None] * eye, right + slack[:, None, None] * old
    )
    return torch.view_as_real(solved).flatten(-2).float()
