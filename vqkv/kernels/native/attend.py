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

#: `struct plane` of attend.h.
_PLANE: tuple[tuple[str, type[ctypes.c_void_p | ctypes.c_int64]], ...] = (
    ("codes", ctypes.c_void_p),
    *((name, ctypes.c_int64) for name in ("row_stride", "head_stride", "token_stride")),
    ("words", ctypes.c_void_p),
    *((name, ctypes.c_int64) for name in ("groups", "stages", "size", "dim")),
)


class _Attention(ctypes.Structure):
    """`struct attention` of attend.h, planes laid out flat."""

    _fields_ = (
        *((f"{plane}_{name}", kind) for plane in ("keys", "values") for name, kind in _PLANE),
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

    A decoding step comes by once a layer with few queries, so describing the codes anew each time
    would count. Meanwhile tensors stay as `Reader` says.

    Raises:
        KernelError: bounds beyond the tokens there are, or turns that are not there.
    """

    def __init__(self, coded: Coded) -> None:
        _check_bounds(coded)
        tensors = {
            "keys_codes": coded.keys.codes,
            "keys_words": coded.keys.codewords.float().contiguous(),
            "values_codes": coded.values.codes,
            "values_words": coded.values.codewords.float().contiguous(),
            "start": coded.start.contiguous(),
            "stop": coded.stop.contiguous(),
        }
        turn_stride = 0
        if coded.order is not None:
            tensors["order"] = coded.order.contiguous()
        if coded.pages is not None:
            tensors["pages"] = coded.pages.int().contiguous()
        if coded.turns is not None:
            page, offset, pairs = coded.turns
            tensors["page_turns"] = page.float().contiguous()
            tensors["offset_turns"] = offset.float().contiguous()
            tensors["pairs"] = pairs.contiguous()
            turn_stride = 0 if len(page) == 1 else page[0].numel()
        self._tensors, self._coded = tensors, coded
        self._batch, self._heads = len(coded.start), len(coded.keys.codewords)
        self._task = _Attention(
            batch=self._batch,
            heads=self._heads,
            page_count=0 if coded.pages is None else coded.pages.shape[1],
            blocks=min(len(coded.keys.codes), len(coded.values.codes)),
            turn_stride=turn_stride,
        )
        for name, plane in (("keys", coded.keys), ("values", coded.values)):
            numbers = (*plane.codes.stride()[:3], *plane.codewords.shape[1:])
            for (field, _), number in zip(_PLANE[1:4] + _PLANE[5:], numbers, strict=True):
                setattr(self._task, f"{name}_{field}", number)

    def __call__(self, query: torch.Tensor) -> Partial:
        """Attention of queries `[B, Q, t, D]`, on the CPU.

        Raises:
            KernelError: a code that names no codeword, a page number that names no block, pairs
                or channels that are not there, or no memory.
        """
        if query.dtype is not torch.float32 or not query.is_contiguous():
            query = query.float().contiguous()
        shape = query.shape
        items = self._batch * self._heads
        # Few rows and heads leave threads idle; then the tokens of each are shared as well.
        parts = max(1, -(-torch.get_num_threads() // max(1, items)))
        found = shape if parts == 1 else (parts, *shape)
        output = torch.empty(found, dtype=torch.float32, device=query.device)
        key_sums = None
        if self._coded.key_sums:
            key_sums = torch.empty(found, dtype=torch.float32, device=query.device)
        lse = torch.empty(found[:-1], dtype=torch.float32, device=query.device)
        task = _Attention.from_buffer_copy(self._task)  # other threads may have queries, too
        task.rows, task.head_dim, task.parts = shape[1] // self._heads * shape[2], shape[3], parts
        task.query, task.output = query.data_ptr(), output.data_ptr()
        task.lse, task.key_mean = lse.data_ptr(), address(key_sums)
        for name, tensor in self._tensors.items():  # a tensor may have moved, as to shared memory
            setattr(task, name, tensor.data_ptr())

        def run(begin: int, end: int) -> int:
            failure: int = library().vqkv_attend(level_number(), ctypes.byref(task), begin, end)
            return failure

        failed = max(in_ranges(items * parts, 1, run), default=0)
        if failed == BAD_PAIR:
            low, high = (int(end) for end in self._tensors["pairs"].aminmax())
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
    """What says where to read, but for codes, pages, pairs and order: C looks at those."""
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
