"""Nearest codewords, and codes chosen together, as `torch.library` custom ops."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkv.kernels.gpu.configs import EncodeConfig, JointConfig, encode_blocks
from vqkv.kernels.gpu.encode import encode_codes
from vqkv.kernels.gpu.encode import encode_pair as encode_pair_kernel
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
        encode_codes[-(-vectors // (config.vectors * config.blocks)), subvectors](
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
        encode_pair_kernel[runs, max(keys.shape[1], values.shape[1]), 2](
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
def encode_joint(x: Tensor, codewords: Tensor, metric: Tensor, sweeps: int) -> Tensor:
    """Codes `[N, M, 1]` (int32) of `x` `[N, M, d]` under `codewords` `[M, 1, K, d]`."""
    vectors, subvectors, dim = x.shape
    units, size = len(metric), codewords.shape[2]
    codes = torch.empty(vectors, subvectors, 1, dtype=torch.int32, device=x.device)
    if codes.numel():
        books = readable(codewords)
        config = JointConfig(subvectors // units, size, dim, encode_blocks(vectors)[0])
        words = x.new_empty(subvectors, config.size, config.depth, dtype=torch.float16)
        longest = x.new_empty(subvectors, dtype=torch.float32)
        prepare_books[subvectors,](books, words, longest, size, dim, config.size, config.depth)
        encode_jointly[-(-vectors // config.vectors), units](
            readable(x),
            books,
            words,
            longest,
            metric.half().contiguous(),
            codes,
            vectors,
            sweeps,
            **config.constants(),
            **config.options(),
        )
    return codes


@encode_joint.register_fake
def _(x: Tensor, codewords: Tensor, metric: Tensor, sweeps: int) -> Tensor:
    return x.new_empty((*x.shape[:2], 1), dtype=torch.int32)
