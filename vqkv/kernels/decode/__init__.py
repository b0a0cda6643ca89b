"""Codes to vectors: look up one codeword per stage and add them up."""

from __future__ import annotations

import torch

from vqkv.kernels.select import select
from vqkv.layouts import Layout


def decode(codes: torch.Tensor, codewords: torch.Tensor) -> torch.Tensor:
    """Vectors `[N, M, d]` (fp32) of codes `[N, M, S]` under codebooks `[M, S, K, d]`."""
    layout = Layout.of_codebook(*codewords.shape)
    vectors: torch.Tensor = select("decode", layout, codes.device).kernel(codes, codewords)
    return vectors
