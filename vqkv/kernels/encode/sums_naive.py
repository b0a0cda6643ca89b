"""The nearest sum of two codewords in torch: all sums, some vectors at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vqkv.kernels.select import Kernel, anywhere

#: Scores held at a time. On a CPU 2 MiB of them stay in a core's cache, which is worth a factor of
#: three; elsewhere 64 MiB keep launches few.
CPU_SCORES, MAX_SCORES = 1 << 19, 1 << 24


def encode_sums(first: torch.Tensor, second: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Codes `[N, M]` of the least `first[a] + second[b] + sizes[a, b]`.

    Args:
        first: `[N, M, K]`.
        second: `[N, M, K]`.
        sizes: `[M, K, K]`.
    """
    blocks = score_blocks(first, second, sizes)
    return torch.cat([scores.flatten(2).argmin(2) for scores in blocks]).int()


def score_blocks(
    first: torch.Tensor, second: torch.Tensor, sizes: torch.Tensor
) -> Iterator[torch.Tensor]:
    """Scores of all sums `[n, M, K, K]`, some vectors at a time."""
    held = CPU_SCORES if first.device.type == "cpu" else MAX_SCORES
    rows = max(1, held // sizes.numel())
    for a, b in zip(first.split(rows), second.split(rows), strict=True):
        yield a.unsqueeze(3) + b.unsqueeze(2) + sizes


KERNEL = Kernel("encode_sums", "naive", encode_sums, anywhere, speed=0)
