"""Attention on codes by `attend.cu`, as a `torch.library` custom op."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from vqkv.kernels.attend.codes import Coded, Plane, Turns
from vqkv.kernels.attend.codes_op import Found, fake
from vqkv.kernels.cuda import build
from vqkv.kernels.cuda.configs import (
    MOST_ROWS,
    AttendVariant,
    MergeVariant,
    Variant,
    most_pages,
)
from vqkv.kernels.cuda.tables import key_table, offset_turns, value_table
from vqkv.kernels.gpu.configs import split_count
from vqkv.layouts import PAGE_TOKENS

Argument = Tensor | ctypes.c_int | ctypes.c_longlong
#: Runs a variant on so many blocks.
Launch = Callable[[Variant, int, Sequence[Argument]], None]


@torch.library.custom_op("vqkv::attend_codes_cuda", mutates_args=(), device_types="cuda")
def attend_codes(
    query: Tensor,
    key_codes: Tensor,
    key_books: Tensor,
    value_codes: Tensor,
    value_books: Tensor,
    start: Tensor,
    stop: Tensor,
    pages: Tensor | None,
    page_turns: Tensor | None,
    offset_turns: Tensor | None,
    pairs: Tensor | None,
    key_sums: bool,
) -> Found:
    """Output, log-sum-exp and key means (empty unless asked for) of `attend.codes.Coded`."""
    from vqkv.kernels.gpu.tensors import multiprocessors

    turns = None
    if page_turns is not None and offset_turns is not None and pairs is not None:
        turns = Turns(page_turns, offset_turns, pairs)
    keys, values = Plane(key_codes, key_books), Plane(value_codes, value_books)
    coded = Coded(keys, values, start, stop, turns, key_sums, pages)
    programs = query.shape[0] * key_books.shape[0]
    # A block has a multiprocessor's shared memory for itself.
    splits = split_count(programs, _page_count(coded), multiprocessors(query.device), resident=1)
    return attend(query, coded, splits, on_gpu)


attend_codes.register_fake(fake)


def attend(query: Tensor, coded: Coded, splits: int, launch: Launch) -> Found:
    """Of queries `[B, Q, t, D]`; a launch for every 16 query rows of a KV head."""
    keys = coded.keys._replace(codes=_readable(coded.keys.codes, of_lanes=4))
    values = coded.values._replace(codes=_readable(coded.values.codes, of_lanes=8))
    coded = coded._replace(keys=keys, values=values)
    by_head = query.float().unflatten(1, (keys.codewords.shape[0], -1)).flatten(2, 3)
    found = [
        _merged(_parts(rows.contiguous(), coded, splits, launch), launch)
        for rows in by_head.split(MOST_ROWS, dim=2)
    ]
    outputs, lses, means = zip(*found, strict=True)
    return (
        _joined(outputs).view(query.shape),
        _joined(lses).view(query.shape[:3]),
        _joined(means).view(query.shape) if coded.key_sums else outputs[0].new_empty(0),
    )


def _page_count(coded: Coded) -> int:
    """Of a row, by shapes alone."""
    if coded.pages is not None:
        return coded.pages.shape[1]
    return -(-coded.keys.codes.shape[2] // PAGE_TOKENS)


def _joined(blocks: Sequence[Tensor]) -> Tensor:
    """Blocks `[B, H, rows, ..]` of rows."""
    return blocks[0] if len(blocks) == 1 else torch.cat(list(blocks), 2)


def _parts(query: Tensor, coded: Coded, splits: int, launch: Launch) -> Found:
    """What each split found for queries `[B, H, rows, D]`."""
    batch, heads, rows, head_dim = query.shape
    keys, values = coded.keys.codes, coded.values.codes
    variant = AttendVariant(
        head_dim,
        coded.keys.codewords.shape[4],
        rows,
        keys.stride(2),
        values.stride(2),
        rope=coded.turns is not None,
        key_sums=coded.key_sums,
        paged=coded.pages is not None,
        most_pages=most_pages(-(-_page_count(coded) // splits)),
    )
    output = query.new_empty((splits, *query.shape))
    lse = query.new_empty((splits, *query.shape[:3]))
    means = query.new_empty((splits, *query.shape[:3], head_dim if coded.key_sums else 0))
    # What a variant does not read may be any tensor.
    page, offset, pairs = query, query, coded.start
    if coded.turns is not None:
        page, pairs = coded.turns.page.contiguous(), coded.turns.pairs.contiguous()
        offset = offset_turns(coded.turns.offset, coded.turns.pairs)
    pages = coded.start if coded.pages is None else coded.pages.contiguous()
    arguments: list[Argument] = [
        query,
        keys,
        *key_table(coded.keys.codewords),
        values,
        *value_table(coded.values.codewords),
        coded.start.contiguous(),
        coded.stop.contiguous(),
        pages,
        page,
        offset,
        pairs,
        output,
        lse,
        means,
    ]
    strides = (
        *keys.stride()[:2],
        *values.stride()[:2],
        0 if coded.pages is None else pages.shape[1],
        page[0].numel() if page.shape[0] > 1 else 0,
    )
    arguments += map(ctypes.c_longlong, strides)
    arguments += map(ctypes.c_int, (batch, heads, rows, splits))
    launch(variant, batch * heads * splits, arguments)
    return output, lse, means


def _merged(parts: Found, launch: Launch) -> Found:
    """Of splits `[splits, B, H, rows, ..]`, the whole."""
    outputs, lses, means = parts
    splits, *_, head_dim = outputs.shape
    if splits == 1:
        return outputs[0], lses[0], means[0]
    output, lse, mean = (torch.empty_like(part[0]) for part in parts)
    arguments: list[Argument] = [outputs, lses, means, output, lse, mean]
    arguments += map(ctypes.c_int, (lse.numel(), splits))
    launch(MergeVariant(head_dim, key_sums=mean.numel() > 0), lse.numel(), arguments)
    return output, lse, mean


def _readable(codes: Tensor, of_lanes: int) -> Tensor:
    """Codes of a token that so many lanes share, a word each.

    As they are where words are aligned and pages whole, else a copy.
    """
    width = codes.shape[3] // of_lanes
    missing = -codes.shape[2] % PAGE_TOKENS
    if not missing and all(n % width == 0 for n in (codes.data_ptr(), *codes.stride()[:3])):
        return codes
    return pad(codes, (0, 0, 0, missing)).clone(memory_format=torch.contiguous_format)


def pointers(arguments: Sequence[Argument]) -> tuple[ctypes.Array[ctypes.c_void_p], list[object]]:
    """What a launch is given: an array of pointers to arguments; and what has to outlive it."""
    values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments]
    addresses = [ctypes.addressof(value) for value in values]
    return (ctypes.c_void_p * len(values))(*addresses), list(values)


def on_gpu(variant: Variant, blocks: int, arguments: Sequence[Argument]) -> None:
    """Launch on the current stream of the queries' GPU."""
    query = arguments[0]
    assert isinstance(query, Tensor)
    shared = variant.shared_bytes
    array, _held = pointers(arguments)
    with torch.cuda.device(query.device):
        kernel = build.function(variant.name, variant.macros(), query.device, shared)
        stream = torch.cuda.current_stream().cuda_stream
        build.launch(kernel, blocks, variant.threads, shared, ctypes.addressof(array), stream)
