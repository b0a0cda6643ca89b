"""Codes to vectors as `torch.library` custom ops."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkv.kernels.gpu.configs import DecodeConfig
from vqkv.kernels.gpu.decode import decode_pages as decode_pages_kernel
from vqkv.kernels.gpu.decode import decode_vectors
from vqkv.kernels.gpu.tensors import half, readable, words
from vqkv.layouts import PAGE_TOKENS

#: Vectors that a program of `decode_vectors` looks up.
ROWS = 64


@torch.library.custom_op("vqkv::decode", mutates_args=(), device_types=("cuda", "cpu"))
def decode(codes: Tensor, codewords: Tensor) -> Tensor:
    """Vectors `[N, M, d]` (fp32) of `codes` `[N, M, S]` under `codewords` `[M, S, K, d]`."""
    subvectors, stages, size, dim = codewords.shape
    vectors = torch.empty(*codes.shape[:2], dim, dtype=torch.float32, device=codes.device)
    rows = codes.shape[0] * subvectors
    if rows:
        decode_vectors[(-(-rows // ROWS),)](
            codes.contiguous(),
            readable(codewords),
            vectors,
            rows,
            subvectors,
            S=stages,
            K=size,
            DIM=dim,
            ROWS=ROWS,
        )
    return vectors


@decode.register_fake
def _(codes: Tensor, codewords: Tensor) -> Tensor:
    return codewords.new_empty((*codes.shape[:2], codewords.shape[3]), dtype=torch.float32)


@torch.library.custom_op("vqkv::decode_pages", mutates_args=(), device_types=("cuda", "cpu"))
def decode_pages(
    codes: Tensor,
    codewords: Tensor,
    pages: Tensor | None,
    page_turns: Tensor | None,
    offset_turns: Tensor | None,
    pairs: Tensor | None,
    first_token: int,
    tokens: int,
    dtype: torch.dtype,
) -> Tensor:
    """States `[B, H, tokens, D]` from the first token, that of a page, on."""
    codes, how = words(codes, codewords)
    batch = codes.shape[0] if pages is None else pages.shape[0]
    heads = codewords.shape[0]
    config = DecodeConfig(how.subvectors * how.dim, how, pages is not None, pairs is not None)
    states = torch.empty(batch, heads, tokens, config.head_dim, dtype=dtype, device=codes.device)
    if not states.numel():
        return states
    # What a launch does not read may be any tensor.
    page_turns = codewords if page_turns is None else readable(page_turns)
    decode_pages_kernel[heads, -(-tokens // PAGE_TOKENS), batch](
        codes,
        half(codewords),
        codes if pages is None else pages.contiguous(),
        page_turns,
        codewords if offset_turns is None else readable(offset_turns),
        codes if pairs is None else pairs.contiguous(),
        states,
        *codes.stride()[:3],
        *states.stride()[:2],
        first_token // PAGE_TOKENS,
        tokens,
        0 if pages is None else pages.shape[1],
        page_turns[0].numel() if page_turns.shape[0] > 1 else 0,
        **config.constants(),
        **config.options(),
    )
    return states


@decode_pages.register_fake
def _(
    codes: Tensor,
    codewords: Tensor,
    pages: Tensor | None,
    page_turns: Tensor | None,
    offset_turns: Tensor | None,
    pairs: Tensor | None,
    first_token: int,
    tokens: int,
    dtype: torch.dtype,
) -> Tensor:
    heads, subvectors, _, _, dim = codewords.shape
    batch = codes.shape[0] if pages is None else pages.shape[0]
    return codewords.new_empty((batch, heads, tokens, subvectors * dim), dtype=dtype)
