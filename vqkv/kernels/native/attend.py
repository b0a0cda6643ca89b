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
    def of(cls, codes: torch.Tensor, codewords: torch.Tensor) -> _Plane:
        """Of tensors that outlive it."""
        return cls(
            codes.data_ptr(), *codes.stride()[:3], codewords.data_ptr(), *codewords.shape[1:]
        )


class _Attention(ctypes.Structure):
    """`struct attention` of attend.h."""

    _fields_ = (
        ("keys", _Plane),
        ("values", _Plane),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "rows", "head_dim", "parts")),
        *((name, ctypes.c_void_p) for name in ("query", "start", "stop", "pages")),
        *((name, ctypes.c_int64) for name in ("page_count", "blocks")),
        ("page_turns", ctypes.c_void_p),
        ("turn_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("offset_turns", "pairs")),
        *((name, ctypes.c_void_p) for name in ("output", "lse", "key_mean")),
    )


def attend_codes(query: torch.Tensor, coded: Coded) -> Partial:
    """Attention of queries `[B, Q, t, D]` on coded tokens, all on the CPU.

    Raises:
        KernelError: bounds beyond the tokens there are, a code that names no codeword, a page
            number that names no block, or turns that are not there.
    """
    batch, _, length, head_dim = query.shape
    heads = coded.keys.codewords.shape[0]
    _check_bounds(coded)
    # Few rows and heads leave threads idle; then the tokens of each are shared as well.
    parts = max(1, -(-torch.get_num_threads() // max(1, batch * heads)))
    # Shapes are changed by views here: a decoding step comes by once a layer, and einops takes as
    # long as the kernel does on a short text.
    rows = query.shape[1] // heads * length
    q = query.float().reshape(batch, heads, rows, head_dim)
    if coded.turns is not None:  # x of all pairs, then y
        q = q.view(batch, heads, rows, head_dim // 2, 2).mT
    q = q.contiguous()
    output = query.new_empty(parts, batch, heads, rows, head_dim, dtype=torch.float32)
    key_sums = torch.empty_like(output) if coded.key_sums else None
    lse = output.new_empty(parts, batch, heads, rows)

    keys, values = (plane.codewords.float().contiguous() for plane in (coded.keys, coded.values))
    start, stop = coded.start.contiguous(), coded.stop.contiguous()
    pages = None if coded.pages is None else coded.pages.int().contiguous()
    turns = None
    if coded.turns is not None:
        page, offset, pairs = coded.turns
        turns = page.float().contiguous(), offset.float().contiguous(), pairs.contiguous()
    task = _Attention(
        _Plane.of(coded.keys.codes, keys),
        _Plane.of(coded.values.codes, values),
        *(batch, heads, rows, head_dim, parts),
        *(q.data_ptr(), start.data_ptr(), stop.data_ptr(), address(pages)),
        0 if pages is None else pages.shape[1],
        min(len(coded.keys.codes), len(coded.values.codes)),
        None if turns is None else turns[0].data_ptr(),
        0 if turns is None or len(turns[0]) == 1 else turns[0].stride(0),
        *((None, None) if turns is None else (turns[1].data_ptr(), turns[2].data_ptr())),
        *(output.data_ptr(), lse.data_ptr(), address(key_sums)),
    )

    def run(begin: int, end: int) -> int:
        failure: int = library().vqkv_attend(level_number(), ctypes.byref(task), begin, end)
        return failure

    failed = max(in_ranges(batch * heads * parts, 1, run), default=0)
    if failed == BAD_PAIR and coded.turns is not None:
        low, high = (int(end) for end in coded.turns.pairs.aminmax())
        raise KernelError(f"pairs lie in 0 to {head_dim // 2 - 1}, given {low} to {high}")
    if failed:
        raise KernelError(FAILURES[failed])

    if parts == 1:
        means, sums, total = output[0], None if key_sums is None else key_sums[0], lse[0]
    else:
        total = lse.logsumexp(0)
        share = torch.exp(lse - total).nan_to_num(0.0).unsqueeze(-1)  # no tokens: −inf − −inf
        means = (output * share).sum(0)
        sums = None if key_sums is None else (key_sums * share).sum(0)
    rows_of = (batch, -1, length)
    return Partial(
        means.reshape(*rows_of, head_dim),
        total.reshape(rows_of),
        None if sums is None else sums.reshape(*rows_of, head_dim),
    )


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
