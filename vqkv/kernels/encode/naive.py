"""Nearest codeword by a batched matrix product: argmin ‖c‖²/2 − ⟨x, c⟩."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vqkv.kernels.select import Kernel, anywhere

#: Codes `[N, M]` of vectors `[N, M, d]` in one stage of codewords `[M, K, d]`.
Nearest = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

#: Scores held at a time; bounds the transient `[M, n, K]` to 128 MiB.
MAX_SCORES = 1 << 25


def nearest(x: torch.Tensor, codewords: torch.Tensor) -> torch.Tensor:
    """Codes `[N, M]` (int32) of `x` `[N, M, d]` in `codewords` `[M, K, d]`, all fp32."""
    half_norms = codewords.square().sum(-1).div_(2).unsqueeze(1)  # [M, 1, K]
    transposed = codewords.transpose(1, 2)  # [M, d, K]
    rows = max(1, MAX_SCORES // max(1, codewords.shape[0] * codewords.shape[1]))
    codes = torch.empty(x.shape[:2], dtype=torch.int32, device=x.device)
    for start in range(0, x.shape[0], rows):
        block = x[start : start + rows].transpose(0, 1)  # [M, n, d]
        scores = torch.baddbmm(half_norms, block, transposed, alpha=-1)
        codes[start : start + rows] = scores.argmin(-1).t()
    return codes


def greedy(nearest: Nearest, x: torch.Tensor, codewords: torch.Tensor) -> torch.Tensor:
    """Codes `[N, M, S]` of `x` `[N, M, d]` under `codewords` `[M, S, K, d]`, stage by stage."""
    residual = x.float()
    stages = codewords.float().unbind(1)
    subspace = torch.arange(codewords.shape[0], device=x.device)
    codes = []
    for index, stage in enumerate(stages):
        codes.append(nearest(residual, stage))
        if index + 1 < len(stages):
            residual = residual - stage[subspace, codes[-1].long()]
    return torch.stack(codes, -1)


def encode(x: torch.Tensor, codewords: torch.Tensor) -> torch.Tensor:
    """Greedy codes `[N, M, S]` of `x` `[N, M, d]` under `codewords` `[M, S, K, d]`."""
    return greedy(nearest, x, codewords)


KERNEL = Kernel("encode", "naive", encode, anywhere, speed=0)
