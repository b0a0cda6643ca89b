"""Nearest codewords: vectors to codes, greedy over stages."""

from __future__ import annotations

import torch

from vqkv.kernels.select import select
from vqkv.layouts import Layout


def encode(x: torch.Tensor, codewords: torch.Tensor) -> torch.Tensor:
    """Codes `[N, M, S]` (int32) of vectors `[N, M, d]` under codebooks `[M, S, K, d]`.

    Each stage takes the codeword nearest to what the stages before it left over, the lowest code
    among equals.
    """
    layout = Layout.of_codebook(*codewords.shape)
    codes: torch.Tensor = select("encode", layout, x.device).kernel(x, codewords)
    return codes
