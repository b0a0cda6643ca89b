"""Nearest codewords, and codes chosen together, as `torch.library` custom ops."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkv.kernels.encode.joint import ahead_words
from vqkv.kernels.gpu.configs import (
    SEARCH_VECTORS,
    EncodeConfig,
    HeadsConfig,
    SearchConfig,
    encode_blocks,
)
from vqkv.kernels.gpu.encode import encode_codes
from vqkv.kernels.gpu.encode import encode_pair as encode_pair_kernel
from vqkv.kernels.gpu.encode_heads import encode_heads as encode_heads_kernel
from vqkv.kernels.gpu.encode_joint import encode_jointly, prepare_books
from vqkv.kernels.gpu.tensors import readable


@torch.library.custom_op("vqkv::encode", mutates_args=(), device_types=("cuda", "cpu"))
def encode(x: Tensor, codewords: Tensor) -> Tensor:
    """Codes `[N, M, S]` (int32) of `x` `[N, M, d]` under `codewords` `[M, S, K, d]`."""
    vectors, subvectors, dim = x.shape
    stages, size = codewords.shape[1:3]
    codes = torch.empty(vectors, subvectors, stages, dtype=torch.int32, device=x.device)
    if codes.numel():
        config = EncodeConfig(stages, size, dim, *encode_blocks(vectors))
        encode_codes[subvectors, -(-vectors // (config.vectors * config.blocks))](
            readable(x),
            readable(codewords),
            codes,
            vectors,
            subvectors,
            **config.constants(),
            **config.options(),
        )
    return codes


@encode.register_fake
def _(x: Tensor, codewords: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:2], codewords.shape[1]), dtype=torch.int32)


@torch.library.custom_op("vqkv::encode_pair", mutates_args=(), device_types=("cuda", "cpu"))
def encode_pair(
    keys: Tensor, key_codewords: Tensor, values: Tensor, value_codewords: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes `[N, M, S]` (uint8) of keys and of values."""
    streams = ((keys, key_codewords), (values, value_codewords))
    key_codes, value_codes = (
        torch.empty(*x.shape[:2], books.shape[1], dtype=torch.uint8, device=x.device)
        for x, books in streams
    )
    vectors = max(keys.shape[0], values.shape[0])
    if vectors:
        stages, size, dim = key_codewords.shape[1:]
        config = EncodeConfig(stages, size, dim, *encode_blocks(vectors))
        runs = -(-vectors // (config.vectors * config.blocks))
        encode_pair_kernel[max(keys.shape[1], values.shape[1]), runs, 2](
            readable(keys),
            readable(key_codewords),
            key_codes,
            *keys.shape[:2],
            readable(values),
            readable(value_codewords),
            value_codes,
            *values.shape[:2],
            *key_codewords.shape[1:],
            *value_codewords.shape[1:],
            config.vectors,
            config.blocks,
            **config.options(),
        )
    return key_codes, value_codes


@encode_pair.register_fake
def _(
    keys: Tensor, key_codewords: Tensor, values: Tensor, value_codewords: Tensor
) -> tuple[Tensor, Tensor]:
    return (
        keys.new_empty((*keys.shape[:2], key_codewords.shape[1]), dtype=torch.uint8),
        values.new_empty((*values.shape[:2], value_codewords.shape[1]), dtype=torch.uint8),
    )


@torch.library.custom_op("vqkv::encode_joint", mutates_args=(), device_types=("cuda", "cpu"))
def encode_joint(
    x: Tensor, codewords: Tensor, metric: Tensor, ahead: Tensor, sweeps: int
) -> Tensor:
    """Codes `[N, M, 1]` (int32) of `x` `[N, M, d]` under `codewords` `[M, 1, K, d]`."""
    vectors, subvectors, dim = x.shape
    units, size = len(metric), codewords.shape[2]
    codes = torch.empty(vectors, subvectors, 1, dtype=torch.int32, device=x.device)
    if codes.numel():
        books = readable(codewords)
        config = SearchConfig(subvectors // units, size, dim, SEARCH_VECTORS)
        by_unit = books[:, 0].unflatten(0, (units, -1))
        # The kernel has V in fp16.
        first = ahead_words(by_unit, ahead.half().float()).flatten(0, 1)
        both = torch.cat([first, books[:, 0].float()])
        words, longest = _prepared(both, config)
        encode_jointly[-(-vectors // config.vectors), units](
            readable(x),
            books,
            words,
            longest,
            torch.stack([ahead.half(), metric.half()]),
            codes,
            vectors,
            1 + sweeps,
            **config.constants(),
            **config.options(),
        )
    return codes


@encode_joint.register_fake
def _(x: Tensor, codewords: Tensor, metric: Tensor, ahead: Tensor, sweeps: int) -> Tensor:
    return x.new_empty((*x.shape[:2], 1), dtype=torch.int32)


@torch.library.custom_op("vqkv::encode_heads", mutates_args=(), device_types=("cuda", "cpu"))
def encode_heads(x: Tensor, codewords: Tensor, coupling: Tensor, sweeps: int) -> Tensor:
    """Codes `[N, M, 1]` (int32) of `x` `[N, M, d]` under `codewords` `[M, 1, K, d]`."""
    vectors, subvectors, dim = x.shape
    sets, heads = coupling.shape[:2]
    codes = torch.empty(vectors, subvectors, 1, dtype=torch.int32, device=x.device)
    if codes.numel():
        books, groups = readable(codewords), subvectors // (sets * heads)
        search = SearchConfig(groups, codewords.shape[2], dim, SEARCH_VECTORS)
        config = HeadsConfig(heads, search)
        encode_heads_kernel[-(-vectors // search.vectors), sets](
            readable(x),
            books,
            *_prepared(books, search),
            coupling.half().contiguous(),
            torch.zeros(vectors, subvectors * dim, dtype=torch.float16, device=x.device),
            codes,
            vectors,
            sweeps,
            **config.constants(),
            **config.options(),
        )
    return codes


@encode_heads.register_fake
def _(x: Tensor, codewords: Tensor, coupling: Tensor, sweeps: int) -> Tensor:
    return x.new_empty((*x.shape[:2], 1), dtype=torch.int32)


def _prepared(books: Tensor, search: SearchConfig) -> tuple[Tensor, Tensor]:
    """Codewords as searches take them, and what they are in units of."""
    subvectors = len(books)
    words = books.new_empty(subvectors, search.size, search.depth, dtype=torch.float16)
    units = books.new_empty(subvectors, dtype=torch.float32)
    prepare_books[subvectors,](
        books, words, units, search.codewords, search.dim, search.size, search.depth
    )
    return words, units
