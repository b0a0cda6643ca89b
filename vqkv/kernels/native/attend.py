"""Attention on codes by the compiled kernel."""

from __future__ import annotations

import ctypes

import torch

from vqkv.errors import KernelError
from vqkv.kernels.attend.codes import Coded, Partial
from vqkv.kernels.native.library import address, in_ranges, level_number, library
from vqkv.layouts import PAGE_TOKENS

BAD_PAIR = 4
FAILURES = {
    1: "no memory for a tile of tokens",
    2: "a code names no codeword",
    3: "a page number names no block",
    5: "the order names a channel that is not there",
}


class _Plane(ctypes.Structure):
    """`struct plane` of attend.h."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("row_stride", "head_stride", "token_stride")),
        ("words", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("groups", "stages", "size", "dim")),
    )

    @classmethod
    def of(cls, codes: torch.Tensor, words: torch.Tensor) -> _Plane:
        """Of tensors that outlive it."""
        return cls(codes.data_ptr(), *codes.stride()[:3], words.data_ptr(), *words.shape[1:])


class _Attention(ctypes.Structure):
    """`struct attention` of attend.h."""

    _fields_ = (
        ("keys", _Plane),
        ("values", _Plane),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "rows", "head_dim", "parts")),
        *((name, ctypes.c_void_p) for name in ("query", "order", "start", "stop", "pages")),
        *((name, ctypes.c_int64) for name in ("page_count", "blocks")),
        ("page_turns", ctypes.c_void_p),
        ("turn_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("offset_turns", "pairs")),
        *((name, ctypes.c_void_p) for name in ("output", "lse", "key_mean")),
    )


class Prepared:
    """Coded tokens as the compiled kernel takes them, for any number of queries.

    A decoding step comes by once a layer, and its queries are few: on a short text it would take
    longer to describe the codes than to read them. The tensors must stay as they are meanwhile,
    but for codes of tokens beyond `stop`.

    Raises:
        KernelError: bounds beyond the tokens there are, or turns that are not there.
    """

    def __init__(self, coded: Coded) -> None:
        _check_bounds(coded)
        keys, values = (plane.codewords.float().contiguous() for plane in coded[:2])
        start, stop = coded.start.contiguous(), coded.stop.contiguous()
        pages = None if coded.pages is None else coded.pages.int().contiguous()
        order = None if coded.order is None else coded.order.contiguous()
        page, offset, pairs = coded.turns or (None, None, None)
        if coded.turns is not None:
            page, offset = (turns.float().contiguous() for turns in coded.turns[:2])
            pairs = coded.turns.pairs.contiguous()
        self._batch, self._heads, self._key_sums = len(start), len(keys), coded.key_sums
        self._pairs = pairs
        self._held = (keys, values, start, stop, pages, order, page, offset, coded)
        self._task = _Attention(
            keys=_Plane.of(coded.keys.codes, keys),
            values=_Plane.of(coded.values.codes, values),
            batch=self._batch,
            heads=self._heads,
            order=address(order),
            start=start.data_ptr(),
            stop=stop.data_ptr(),
            pages=address(pages),
            page_count=0 if pages is None else pages.shape[1],
            blocks=min(len(coded.keys.codes), len(coded.values.codes)),
            page_turns=address(page),
            turn_stride=0 if page is None or len(page) == 1 else page.stride(0),
            offset_turns=address(offset),
            pairs=address(pairs),
        )

    def __call__(self, query: torch.Tensor) -> Partial:
        """Attention of queries `[B, Q, t, D]`, on the CPU.

        Raises:
            KernelError: a code that names no codeword, a page number that names no block, pairs
                that are not there, or no memory.
        """
        if query.dtype is not torch.float32 or not query.is_contiguous():
            query = query.float().contiguous()
        shape = query.shape
        items = self._batch * self._heads
        # Few rows and heads leave threads idle; then the tokens of each are shared as well.
        parts = max(1, -(-torch.get_num_threads() // max(1, items)))
        found = shape if parts == 1 else (parts, *shape)
        output = torch.empty(found, dtype=torch.float32, device=query.device)
        key_sums = torch.empty_like(output) if self._key_sums else None
        lse = torch.empty(found[:-1], dtype=torch.float32, device=query.device)
        task = _Attention.from_buffer_copy(self._task)  # other threads may have queries, too
        task.rows, task.head_dim, task.parts = shape[1] // self._heads * shape[2], shape[3], parts
        task.query, task.output = query.data_ptr(), output.data_ptr()
        task.lse, task.key_mean = lse.data_ptr(), address(key_sums)

        def run(begin: int, end: int) -> int:
            failure: int = library().vqkv_attend(level_number(), ctypes.byref(task), begin, end)
            return failure

        failed = max(in_ranges(items * parts, 1, run), default=0)
        if failed == BAD_PAIR and self._pairs is not None:
            low, high = (int(end) for end in self._pairs.aminmax())
            raise KernelError(f"pairs lie in 0 to {shape[3] // 2 - 1}, given {low} to {high}")
        if failed:
            raise KernelError(FAILURES[failed])
        return Partial(output, lse, key_sums) if parts == 1 else _merged(output, lse, key_sums)


def attend_codes(query: torch.Tensor, coded: Coded) -> Partial:
    """Attention of queries `[B, Q, t, D]` on coded tokens, all on the CPU.

    Raises:
        KernelError: where `Prepared` does.
    """
    return Prepared(coded)(query)


def _merged(output: torch.Tensor, lse: torch.Tensor, key_sums: torch.Tensor | None) -> Partial:
    """Of parts `[parts, B, Q, t, ..]`, the whole."""
    total = lse.logsumexp(0)
    share = torch.exp(lse - total).nan_to_num(0.0).unsqueeze(-1)  # no tokens: −inf − −inf
    means = (output * share).sum(0)
    return Partial(means, total, None if key_sums is None else (key_sums * share).sum(0))


def _check_bounds(coded: Coded) -> None:
    """Everything that says where to read but codes, pages and pairs: the kernel looks at those."""
    if not len(coded.stop):
        return
    room = coded.keys.codes.shape[2], coded.values.codes.shape[2]
    if coded.pages is not None:
        room = (coded.pages.shape[1] * PAGE_TOKENS,) * 2
    first, last = min(coded.start.tolist()), max(coded.stop.tolist())
    if first < 0 or last > min(room):
        raise KernelError(f"start and stop lie in 0 to {min(room)}, given {first} to {last}")
    if coded.turns is None:
        return
    page = coded.turns.page
    batch, half = len(coded.stop), page.shape[2]
    if page.shape[0] not in (1, batch) or page.shape[1] * PAGE_TOKENS < last:
        raise KernelError(
            f"turns of pages are [{batch} or 1, {-(-last // PAGE_TOKENS)} or more, {half}, 2], "
            f"given {list(page.shape)}"
        )
