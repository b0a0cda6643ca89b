"""Tensors as kernels read them."""

from __future__ import annotations

from collections.abc import MutableMapping
from functools import cache

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from vqkv.kernels.gpu.configs import Words, word_bytes

#: Codewords, the version of them that was converted, and the result.
_halves: MutableMapping[Tensor, tuple[int, Tensor]] = WeakTensorKeyDictionary()


def readable(x: Tensor) -> Tensor:
    """Contiguous, and on a CPU in fp32: Triton's interpreter takes bf16 for integers."""
    return (x.float() if x.device.type == "cpu" else x).contiguous()


def half(codewords: Tensor) -> Tensor:
    """In fp16, as matrix instructions take them; converted once for each tensor, not each call."""
    if codewords.dtype == torch.float16:
        return codewords.contiguous()
    version = 0 if codewords.is_inference() else codewords._version  # inference has none
    held = _halves.get(codewords)
    if held is None or held[0] != version:
        _halves[codewords] = held = (version, codewords.half().contiguous())
    return held[1]


def words(codes: Tensor, codewords: Tensor) -> tuple[Tensor, Words]:
    """Codes `[.., .., .., M · S]` and how to read them; a copy where they lie askew."""
    _, subvectors, stages, size, dim = codewords.shape
    width = subvectors * stages
    word = word_bytes(stages, width, codes.data_ptr(), *codes.stride()[:3])
    if not word:
        codes = codes.clone(memory_format=torch.contiguous_format)
        word = word_bytes(stages, width)
    return codes, Words(subvectors, stages, size, dim, word)


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; a few where kernels are interpreted."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count
