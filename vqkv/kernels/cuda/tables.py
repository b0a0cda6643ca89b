"""Codebooks and turns as the kernel reads them: what lanes take together side by side.

Made once of the tensors they are of, and kept as long as these are.
"""

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
        entries: uint8, bits of e4m3; of values `[H, M / 8, 256, 8, d]`, the s-th subvectors of
            eight parts side by side. Of keys `[H, D / 64, 256, 16 / d, 4, d]`, of four parts,
            `16 / d` subvectors of each, whose even channels of two pairs stand before the odd ones.
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
#: By offsets, then by pairs: whoever keeps both, as one who has captured a graph, keeps the table.
_held_turns: MutableMapping[Tensor, MutableMapping[Tensor, Tensor]] = WeakTensorKeyDictionary()


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


def offset_turns(offset: Tensor, pairs: Tensor) -> Tensor:
    """`Turns.offset` and `Turns.pairs` as `[H, 4, D / 16, 32, 2, 2, 2]` (fp16).

    By tile of 16 tokens, step and lane: of rows g and g + 8 of the tile, the cosines of two pairs
    and their sines. Neither tensor may change afterwards. Kernels wait for what runs before them
    in their stream until they read it, so nothing is synchronized here.

    Raises:
        KernelError: they would be converted while a CUDA graph is captured.
    """
    by_pairs = _held_turns.setdefault(offset, WeakTensorKeyDictionary())
    table = by_pairs.get(pairs)
    if table is None:
        _refuse_in_a_capture(offset)
        # The g-th row is token 4 (g % 2) + g // 2, see `token_of` in attend.cu.
        by_row = offset.half()[:, pairs.long()].unflatten(0, (4, 2, 2, 4)).unflatten(5, (4, -1, 2))
        table = by_row.permute(4, 0, 6, 3, 2, 5, 1, 8, 7).flatten(3, 5).contiguous()
        by_pairs[pairs] = table
    return table


def _refuse_in_a_capture(tensor: Tensor) -> None:
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        raise KernelError("tables are converted at a first call, before a graph is captured")


def _tables(codewords: Tensor) -> _Tables:
    version = 0 if codewords.is_inference() else codewords._version  # inference has none
    held = _held.get(codewords)
    if held is None or held.version != version:
        _refuse_in_a_capture(codewords)
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
    # `SIDE` in attend.cu; the code comes before the subvector there.
    keys = keys.unflatten(1, (-1, 16 // codewords.shape[4])).transpose(2, 3).contiguous()
    return _Tables(version, Table(keys, scale), Table(values, scale))


def _side_by_side(words: Tensor, parts: int) -> Tensor:
    """Words `[H, M, 1, 256, d]` as `[H, M / parts, 256, parts, d]`."""
    heads, subvectors, _, size, dim = words.shape
    whole = words.reshape(heads, parts, subvectors // parts, size, dim)
    return whole.permute(0, 2, 3, 1, 4).contiguous()
