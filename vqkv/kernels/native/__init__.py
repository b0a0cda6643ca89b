"""The compiled CPU kernels, called through ctypes. Absent where the package was built without C."""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Literal, NamedTuple, TypeVar

import torch

from vqkv.errors import KernelError, StateError

Level = Literal["scalar", "avx2", "avx512"]
LEVELS: tuple[Level, ...] = ("scalar", "avx2", "avx512")

#: Rows below which another thread costs more than it gives.
MIN_ROWS = 256

R = TypeVar("R")

_forced: list[Level] = []


class Statistics(NamedTuple):
    """What one assignment step of k-means finds: codes `[N, M]`, and in fp64 the rest."""

    codes: torch.Tensor
    sums: torch.Tensor  # [M, K, d]
    counts: torch.Tensor  # [M, K]
    inertia: torch.Tensor  # [M]


def available() -> bool:
    """Whether the compiled kernels are there."""
    return unavailable_reason() is None


@cache
def unavailable_reason() -> str | None:
    """Why the compiled kernels are not there, or None."""
    try:
        _library()
    except (ImportError, OSError) as error:
        return f"vqkv was built without a C compiler, or its kernels do not load ({error})"
    return None


def simd_level() -> Level:
    """The level in use: the best of this CPU, unless a lower one is forced."""
    return _forced[-1] if _forced else LEVELS[_library().vqkv_best_level()]


@contextmanager
def forced_level(level: Level) -> Iterator[None]:
    """Use a lower level within a block, for tests.

    Raises:
        KernelError: this CPU does not have it.
    """
    best = LEVELS[_library().vqkv_best_level()]
    if LEVELS.index(level) > LEVELS.index(best):
        raise KernelError(f"this CPU has {best} at best, {level} was asked for")
    _forced.append(level)
    try:
        yield
    finally:
        _forced.pop()


def nearest(x: torch.Tensor, codewords: torch.Tensor) -> torch.Tensor:
    """Codes `[N, M]` (int32): the nearest of `codewords` `[M, K, d]` to each of `x` `[N, M, d]`.

    The lowest code wins among equals. Both are fp32 on the CPU.

    Raises:
        StateError: wrong type, device or shape.
    """
    x, codewords, half_norms = _prepared(x, codewords)
    codes = torch.empty(x.shape[:2], dtype=torch.int32)
    _in_ranges(x.shape[0], lambda begin, end: _search(x, codewords, half_norms, codes, begin, end))
    return codes


def assign_accumulate(
    x: torch.Tensor, codewords: torch.Tensor, weights: torch.Tensor | None = None
) -> Statistics:
    """One assignment step of k-means: nearest codewords, and what the update needs of them.

    Args:
        x: `[N, M, d]`.
        codewords: `[M, K, d]`.
        weights: `[N]` or `[N, M]`; ones where left out.

    Raises:
        StateError: wrong type, device or shape.
    """
    x, codewords, half_norms = _prepared(x, codewords)
    if weights is not None:
        if weights.ndim == 1:
            weights = weights.unsqueeze(1)
        weights = weights.float().expand(x.shape[:2]).contiguous()
    codes = torch.empty(x.shape[:2], dtype=torch.int32)
    books = codewords.shape

    def step(begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        _search(x, codewords, half_norms, codes, begin, end)
        sums = torch.zeros(books, dtype=torch.float64)
        counts = torch.zeros(books[:2], dtype=torch.float64)
        inertia = torch.zeros(books[0], dtype=torch.float64)
        _library().vqkv_accumulate(
            *(x.data_ptr(), codewords.data_ptr(), codes.data_ptr()),
            None if weights is None else weights.data_ptr(),
            *(*books, begin, end),
            *(sums.data_ptr(), counts.data_ptr(), inertia.data_ptr()),
        )
        return sums, counts, inertia

    parts = _in_ranges(x.shape[0], step)
    if not parts:
        parts = [step(0, 0)]
    totals = [torch.stack(column).sum(0) for column in zip(*parts, strict=True)]
    return Statistics(codes, *totals)


def _search(
    x: torch.Tensor,
    codewords: torch.Tensor,
    half_norms: torch.Tensor,
    codes: torch.Tensor,
    begin: int,
    end: int,
) -> None:
    failed = _library().vqkv_nearest(
        LEVELS.index(simd_level()),
        *(x.data_ptr(), codewords.data_ptr(), half_norms.data_ptr()),
        *(*codewords.shape, begin, end),
        codes.data_ptr(),
    )
    if failed:
        raise MemoryError("no memory for a block of vectors")


def _prepared(
    x: torch.Tensor, codewords: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    for name, tensor in (("x", x), ("codewords", codewords)):
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise StateError(
                f"{name} is float32 on the cpu, given {tensor.dtype} on {tensor.device}"
            )
    if (
        x.ndim != 3
        or codewords.ndim != 3
        or (x.shape[1], x.shape[2]) != (codewords.shape[0], codewords.shape[2])
        or not codewords.shape[1]
    ):
        raise StateError(
            f"x [N, M, d] and codewords [M, K, d] agree in M and d, and K is positive; given "
            f"{list(x.shape)} and {list(codewords.shape)}"
        )
    codewords = codewords.contiguous()
    half_norms = codewords.square().sum(-1).div_(2).contiguous()
    return x.contiguous(), codewords, half_norms


def _in_ranges(rows: int, work: Callable[[int, int], R]) -> list[R]:
    """`work(begin, end)` over row ranges, one per thread of torch's."""
    threads = max(1, min(torch.get_num_threads(), rows // MIN_ROWS))
    edges = [rows * i // threads for i in range(threads + 1)]
    ranges = [(a, b) for a, b in pairwise(edges) if a < b]
    if len(ranges) <= 1:
        return [work(*each) for each in ranges]
    return list(_pool().map(lambda each: work(*each), ranges))


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="vqkv")


# A forked child has the pool but none of its threads, and would wait for them for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


@cache
def _library() -> ctypes.CDLL:
    """The shared library. Raises ImportError where it was not built."""
    module = importlib.import_module("vqkv.kernels.native._native")
    assert module.__file__ is not None
    library = ctypes.CDLL(module.__file__)
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.vqkv_best_level.argtypes = []
    library.vqkv_best_level.restype = ctypes.c_int
    library.vqkv_nearest.argtypes = [ctypes.c_int, *[pointer] * 3, *[size] * 5, pointer]
    library.vqkv_nearest.restype = ctypes.c_int
    library.vqkv_accumulate.argtypes = [*[pointer] * 4, *[size] * 5, *[pointer] * 3]
    library.vqkv_accumulate.restype = None
    return library
