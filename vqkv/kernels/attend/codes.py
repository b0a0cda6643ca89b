"""Attention on the codes themselves: what a fused kernel is given, and what it gives back.

A kernel sees plain product or residual codes. Everything linear around them (rotations, means,
values predicted from keys) is folded into the queries before it and into its output after it, see
`vqkv.folding`; exact sinks and the exact tail are merged in by log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from vqkv.errors import KernelError
from vqkv.kernels.select import Selection, select
from vqkv.layouts import PAGE_TOKENS, Layout

#: Query rows, per query head, up to which attention reads codes.
MAX_QUERY_ROWS = 16


class Plane(NamedTuple):
    """One stream's codes and codebooks.

    Attributes:
        codes: `[B, H, T, M * S]` (uint8), a byte a code, the stages of a subvector side by side.
            Strides are free but for the last, which is 1. With `pages`, `[blocks, H, 64, M * S]`.
        codewords: `[H, M, S, K, d]`, fp32 or fp16, `M · d = D`. Channels are in coded order.
            They are finite: kernels may read those that no code names.
    """

    codes: torch.Tensor
    codewords: torch.Tensor


class Turns(NamedTuple):
    """RoPE of keys that were coded before it, by page of 64 tokens.

    Token o of page p stands at position `start_p + o`: a score is that of q turned back by
    `start_p` and of the decoded key turned by o. Cosines and sines are stacked in the last dim;
    (x, y) turned by (c, s) is (c x − s y, c y + s x).

    Attributes:
        page: `[B or 1, P, D / 2, 2]` (fp32), of each page's first position; c² + s² = 1.
        offset: `[64, D / 2, 2]` (fp32), of 0 to 63; scaled where the model scales its tables.
        pairs: `[H, D / 2]` (int32): which row of the tables turns channels 2j and 2j + 1 of head h
            in coded order.
    """

    page: torch.Tensor
    offset: torch.Tensor
    pairs: torch.Tensor


class Coded(NamedTuple):
    """The coded tokens of one layer.

    Attributes:
        keys: every query sees all of them, since what is coded is older than any query.
        values: of the same tokens.
        start: `[B]` (int32): a row's first token that counts; the sinks before it are exact.
        stop: `[B]` (int32): one past its last. Where `stop <= start` a row has no coded tokens.
        turns: for keys coded before RoPE; None for keys coded after it.
        key_sums: also return the weighted sums of decoded keys, before RoPE.
        pages: `[B, P]` (int32): the block that holds each page, where codes lie in blocks.
        order: `[H, D]` (int64): the channel of a query that meets each of the keys' coded ones;
            None where queries are in coded order.
    """

    keys: Plane
    values: Plane
    start: torch.Tensor
    stop: torch.Tensor
    turns: Turns | None = None
    key_sums: bool = False
    pages: torch.Tensor | None = None
    order: torch.Tensor | None = None


class Partial(NamedTuple):
    """Softmax over coded tokens alone, in fp32, to be merged with others.

    Attributes:
        output: `[B, Q, t, D]`: weighted means of decoded values, in coded order; zeros where a row
            has no coded tokens.
        lse: `[B, Q, t]`: log-sum-exp of the scores; −inf where a row has no coded tokens.
        key_mean: `[B, Q, t, D]`: weighted means of decoded keys before RoPE, where asked for.
    """

    output: torch.Tensor
    lse: torch.Tensor
    key_mean: torch.Tensor | None = None


class AttendLayout(NamedTuple):
    """What a fused kernel is chosen by: the layouts of both streams of a layer."""

    keys: Layout
    values: Layout


def attend_codes(query: torch.Tensor, coded: Coded, layout: AttendLayout) -> Partial:
    """Attention of queries `[B, Q, t, D]` on coded tokens, at most 16 rows a head.

    Queries are scaled already; query heads of one KV head are neighbours.

    Raises:
        KernelError: arguments that do not fit each other, or no kernel takes this layout.
    """
    return Reader(coded, layout)(query)


class Reader:
    """`attend_codes` for many queries on the same coded tokens, by the kernel that the first finds.

    What does not change from query to query is looked at and made ready once. Shapes, strides and
    contents stay as they are meanwhile, but for codes from `stop` on; where they lie may change.
    """

    def __init__(self, coded: Coded, layout: AttendLayout) -> None:
        self.coded, self.layout = coded, layout
        self._read: Callable[[torch.Tensor], Partial] | None = None
        self._checked: tuple[object, ...] = ()

    def __call__(self, query: torch.Tensor) -> Partial:
        """Of queries `[B, Q, t, D]`. Raises KernelError where `attend_codes` does."""
        fresh = self._checked != (query.shape, query.device)
        if fresh:
            check(query, self.coded)
        if self._read is None:
            self._read = selection(self.layout, query.device).kernel.prepared(self.coded)
        found = self._read(query)
        if fresh:
            _check_found(found, query, self.coded.key_sums)
            self._checked = query.shape, query.device
        return found


def selection(layout: AttendLayout, device: torch.device) -> Selection:
    """The kernel for a layout. Raises KernelError where none takes it."""
    return select("attend_codes", layout, device)


def in_coded_order(query: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """Queries `[B, Q, t, D]` as they meet keys, by `Coded.order`."""
    if order is None:
        return query
    rows = query.reshape(query.shape[0], len(order), -1, query.shape[3])
    return rows.gather(3, order[:, None].expand_as(rows)).view(query.shape)


def unfit(layout: AttendLayout) -> str | None:
    """Why no kernel of this contract can read a layer's codes, or None."""
    for name, stream in (("keys", layout.keys), ("values", layout.values)):
        if not stream.head_local:
            return f"{name}: codes or transforms mix heads"
        if len(stream.segments) != 1:
            return f"{name}: {len(stream.segments)} segments, one is read"
        segment = stream.segments[0]
        if segment.code_bits != 8:
            return f"{name}: codes of {segment.code_bits} bits, a byte each is read"
        if stream.side:
            return f"{name}: side scalars ({', '.join(field.name for field in stream.side)})"
        if stream.token_group != 1:
            return f"{name}: runs of {stream.token_group} tokens are decoded together"
    if layout.keys.sources:
        return "keys: predicted from other streams"
    if layout.values.sources not in ((), (("keys", 0),)):
        return "values: predicted from other streams than the keys of their layer"
    if layout.keys.rope == "pre" and not layout.keys.pairs_whole:
        return "keys: coded before RoPE with pairs split over codes"
    return None


def check(query: torch.Tensor, coded: Coded) -> None:
    """Raises KernelError where shapes, types or devices do not fit each other.

    Codes and page numbers are not looked at: on a GPU that would wait for it.
    """
    if query.ndim != 4 or not 1 <= query.shape[2] <= MAX_QUERY_ROWS:
        raise KernelError(
            f"queries are [B, Q, t, D] with 1 to {MAX_QUERY_ROWS} rows t, given {list(query.shape)}"
        )
    batch, queries, _, head_dim = query.shape
    for name, plane in (("keys", coded.keys), ("values", coded.values)):
        books, codes = plane.codewords, plane.codes
        if books.ndim != 5 or books.shape[1] * books.shape[4] != head_dim:
            raise KernelError(
                f"{name}: codewords are [H, M, S, K, d] with M · d = {head_dim}, "
                f"given {list(books.shape)}"
            )
        heads, groups, stages, size, _ = books.shape
        if queries % heads:
            raise KernelError(f"{queries} query heads do not share {heads} KV heads evenly")
        if size > 256:
            raise KernelError(f"{name}: a byte cannot name one of {size} codewords")
        if codes.dtype != torch.uint8 or codes.ndim != 4 or codes.stride(3) != 1:
            raise KernelError(
                f"{name}: codes are uint8 [B, H, T, M · S] with codes side by side, given "
                f"{codes.dtype} {list(codes.shape)} with strides {list(codes.stride())}"
            )
        rows = batch if coded.pages is None else codes.shape[0]
        if codes.shape[:2] != (rows, heads) or codes.shape[3] != groups * stages:
            raise KernelError(
                f"{name}: codes are [{rows}, {heads}, T, {groups * stages}], "
                f"given {list(codes.shape)}"
            )
        if coded.pages is not None and codes.shape[2] != PAGE_TOKENS:
            raise KernelError(f"{name}: a block holds {PAGE_TOKENS} tokens, not {codes.shape[2]}")
    for name, bound in (("start", coded.start), ("stop", coded.stop)):
        if bound.shape != (batch,) or bound.dtype != torch.int32:
            raise KernelError(f"{name} is int32 [{batch}], given {bound.dtype} {list(bound.shape)}")
    _check_turns(coded, head_dim)
    order = coded.order
    if order is not None and (order.shape != (heads, head_dim) or order.dtype != torch.int64):
        raise KernelError(
            f"order is int64 [{heads}, {head_dim}], given {order.dtype} {list(order.shape)}"
        )
    tensors = [*coded.keys, *coded.values, coded.start, coded.stop, *(coded.turns or ())]
    tensors += [tensor for tensor in (coded.pages, order) if tensor is not None]
    devices = {tensor.device for tensor in tensors} | {query.device}
    if len(devices) > 1:
        raise KernelError(f"all tensors lie on one device, given {sorted(map(str, devices))}")


def _check_found(found: Partial, query: torch.Tensor, key_sums: bool) -> None:
    """Of a kernel, which may be a plugin's: compiled ones go on with what it found."""
    expected = {"output": query.shape, "lse": query.shape[:3]}
    expected |= {"key_mean": query.shape} if key_sums else {}
    for name, shape in expected.items():
        tensor = getattr(found, name)
        if tensor is None or tensor.shape != shape or tensor.device != query.device:
            given = "nothing" if tensor is None else f"{list(tensor.shape)} on {tensor.device}"
            raise KernelError(
                f"the kernel's {name}: {list(shape)} on {query.device} expected, found {given}"
            )


def _check_turns(coded: Coded, head_dim: int) -> None:
    if coded.turns is None:
        return
    page, offset, pairs = coded.turns
    half = head_dim // 2
    fits = (
        head_dim % 2 == 0
        and coded.keys.codewords.shape[4] % 2 == 0
        and page.ndim == 4
        and page.shape[2:] == (half, 2)
        and offset.shape == (PAGE_TOKENS, half, 2)
        and pairs.shape == (coded.keys.codewords.shape[0], half)
        and pairs.dtype == torch.int32
    )
    if not fits:
        raise KernelError(
            f"turns are page [B, P, {half}, 2], offset [{PAGE_TOKENS}, {half}, 2] and pairs int32 "
            f"[H, {half}], with whole pairs in a code; given {list(page.shape)}, "
            f"{list(offset.shape)} and {pairs.dtype} {list(pairs.shape)}"
        )
