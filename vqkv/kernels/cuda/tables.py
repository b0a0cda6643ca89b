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
        entries: `[H, M / 8, 256, 8, d]` (uint8, bits of e4m3): the u-th subvectors of eighths.
        scale: `[H]` (fp32), powers of two.
    """

    entries: Tensor
    scale: Tensor


#: Codewords, the version of them that was converted, and the result.
_tables: MutableMapping[Tensor, tuple[int, Table]] = WeakTensorKeyDictionary()


def table(codewords: Tensor) -> Table:
    """Of codewords `[H, M, 1, K, d]`; converted once for each tensor, not each call.

    Raises:
        KernelError: they would be converted while a CUDA graph is captured.
    """
    version = 0 if codewords.is_inference() else codewords._version  # inference has none
    held = _tables.get(codewords)
    if held is None or held[0] != version:
        if codewords.is_cuda and torch.cuda.is_current_stream_capturing():
            raise KernelError("codebooks are converted at a first call, before a graph is captured")
        _tables[codewords] = held = (version, _converted(codewords))
    return held[1]


def as_read(codewords: Tensor) -> Tensor:
    """Codewords `[H, M, 1, K, d]` (fp32) as the kernel reads them: rounded to e4m3."""
    entries, scale = table(codewords)
    heads, per_eighth, size, _, dim = entries.shape
    words = entries.view(FP8).float() * scale[:, None, None, None, None]
    whole = words.permute(0, 3, 1, 2, 4).reshape(heads, 8 * per_eighth, 1, size, dim)
    return whole[:, :, :, : codewords.shape[3]]


def _converted(codewords: Tensor) -> Table:
    heads, subvectors, _, size, dim = codewords.shape
    most = codewords.float().abs().amax((1, 2, 3, 4)).clamp_min(torch.finfo(torch.float32).tiny)
    scale = torch.exp2(torch.ceil(torch.log2(most / torch.finfo(FP8).max)))
    scaled = codewords.float() / scale[:, None, None, None, None]
    words = pad(scaled, (0, 0, 0, CODEWORDS - size)).to(FP8).view(torch.uint8)
    eighths = words.reshape(heads, 8, subvectors // 8, CODEWORDS, dim)
    return Table(eighths.permute(0, 2, 3, 1, 4).contiguous(), scale)
