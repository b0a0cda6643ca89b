"""Codebooks as the kernel reads them: in fp8, what lanes look up together side by side."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakTensorKeyDictionary

from vqkv.errors import KernelError
from vqkv.kernels.cuda.configs import CODEWORDS

FP8 = torch.float8_e4m3fn


class Table(NamedTuple):
    """Codewords of a layer's stream are about `entries * scale`.

    Attributes:
        entries: `[H, M / n, 256, n, d]` (uint8, bits of e4m3): the s-th subvectors of `n` parts,
            quarters of keys and eighths of values. Of keys, the even channels of two pairs stand
            before the odd ones.
        scale: `[H]` (fp32), powers of two.
    """

    entries: Tensor
    scale: Tensor


class _Tables(NamedTuple):
    """Of codewords of one version, however they are read."""

    version: int
    keys: Table
    values: Table


_held: MutableMapping[Tensor, _Tables] = WeakTensorKeyDictionary()


def key_table(codewords: Tensor) -> Table:
    """Of codewords `[H, M, 1, K, d]`; converted once for each tensor, not each call.

    Where codewords have changed in place, so does the table: a graph that was captured reads it.

    Raises:
        KernelError: they would be converted while a CUDA graph is captured.
    """
    return _tables(codewords).keys


def value_table(codewords: Tensor) -> Table:
    """As `key_table`."""
    return _tables(codewords).values


def as_read(codewords: Tensor) -> Tensor:
    """Codewords `[H, M, 1, K, d]` (fp32) as the kernel reads them: rounded to e4m3."""
    scaled, scale = _scaled(codewords)
    return scaled.to(FP8).float() * scale[:, None, None, None, None]


def _tables(codewords: Tensor) -> _Tables:
    version = 0 if codewords.is_inference() else codewords._version  # inference has none
    held = _held.get(codewords)
    if held is None or held.version != version:
        if codewords.is_cuda and torch.cuda.is_current_stream_capturing():
            raise KernelError("codebooks are converted at a first call, before a graph is captured")
        fresh = _converted(codewords, version)
        if held is not None:
            for old, new in zip(
                (*held.keys, *held.values), (*fresh.keys, *fresh.values), strict=True
            ):
                old.copy_(new)
            fresh = held._replace(version=version)
        _held[codewords] = held = fresh
        if codewords.is_cuda:  # kernels read tables before they wait for what runs before them
            torch.cuda.current_stream(codewords.device).synchronize()
    return held


def _scaled(codewords: Tensor) -> tuple[Tensor, Tensor]:
    """Codewords in units of a power of two per head, in which they fit into e4m3."""
    most = codewords.float().abs().amax((1, 2, 3, 4)).clamp_min(torch.finfo(torch.float32).tiny)
    scale = torch.exp2(torch.ceil(torch.log2(most / torch.finfo(FP8).max)))
    return codewords.float() / scale[:, None, None, None, None], scale


def _converted(codewords: Tensor, version: int) -> _Tables:
    scaled, scale = _scaled(codewords)
    words = pad(scaled, (0, 0, 0, CODEWORDS - codewords.shape[3])).to(FP8).view(torch.uint8)
    even_first = words.unflatten(4, (-1, 2, 2)).transpose(5, 6).flatten(4)
    keys, values = _side_by_side(even_first, 4), _side_by_side(words, 8)
    return _Tables(version, Table(keys, scale), Table(values, scale))


def _side_by_side(words: Tensor, parts: int) -> Tensor:
    """Words `[H, M, 1, 256, d]` as `[H, M / parts, 256, parts, d]`."""
    heads, subvectors, _, size, dim = words.shape
    whole = words.reshape(heads, parts, subvectors // parts, size, dim)
    return whole.permute(0, 2, 3, 1, 4).contiguous()
