"""The shared library, its SIMD levels, and threads to share work."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Literal, TypeVar, get_args

import torch

from vqkv.errors import KernelError

#: `avx512_vbmi` is AVX-512 with look-ups of bytes in registers, `avx512_vnni` that and sums of
#: products of pairs of 16 bits, where these are the faster way, as on Intel's CPUs.
Level = Literal["baseline", "avx2", "avx512", "avx512_vbmi", "avx512_vnni"]
LEVELS: tuple[Level, ...] = get_args(Level)

#: Floats of the longest vectors.
MOST_LANES = 16

R = TypeVar("R")

_forced: list[Level] = []


def available() -> bool:
    """Whether the compiled kernels are there. Raises KernelError where they are stale."""
    return unavailable_reason() is None


@cache
def unavailable_reason() -> str | None:
    """Why the compiled kernels are not there, or None. Raises KernelError where they are stale."""
    try:
        library()
    except (ImportError, OSError) as error:
        return f"vqkv was built without a C compiler, or its kernels do not load ({error})"
    return None


def refusal(device: torch.device) -> str | None:
    """Why the compiled kernels do not run on a device, or None.

    Raises:
        KernelError: they were built from other sources than lie beside them.
    """
    if device.type != "cpu":
        return f"runs on cpu, not on {device.type}"
    return unavailable_reason()


def simd_level() -> Level:
    """The level in use: the best of this CPU, unless a lower one is forced."""
    return _forced[-1] if _forced else LEVELS[library().vqkv_best_level()]


def level_number() -> int:
    """Of the level in use, as the C code counts."""
    return LEVELS.index(simd_level())


@contextmanager
def forced_level(level: Level) -> Iterator[None]:
    """Use another level than the best within a block, for tests.

    Raises:
        KernelError: this CPU does not have it.
    """
    best = LEVELS[library().vqkv_best_level()]
    # Where there are look-ups of bytes there are such products, if not as the faster way.
    has = LEVELS if best == "avx512_vbmi" else LEVELS[: LEVELS.index(best) + 1]
    if level not in has:
        raise KernelError(f"this CPU has {has[-1]} at best, {level} was asked for")
    _forced.append(level)
    try:
        yield
    finally:
        _forced.pop()


def padded(x: torch.Tensor, value: float) -> torch.Tensor:
    """The last axis made up to whole vectors of any level, contiguous."""
    missing = -x.shape[-1] % MOST_LANES
    return torch.nn.functional.pad(x, (0, missing), value=value).contiguous()


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's numbers begin; None, which is NULL, where there is none."""
    return None if tensor is None else tensor.data_ptr()


def in_ranges(count: int, least: int, work: Callable[[int, int], R]) -> list[R]:
    """`work(begin, end)` over ranges of `count` things, one per thread of torch's.

    Args:
        count: how many things there are.
        least: things below which another thread costs more than it gives.
        work: what to do with a range.
    """
    threads = max(1, min(torch.get_num_threads(), count // least))
    if threads == 1:
        return [work(0, count)] if count else []
    edges = [count * i // threads for i in range(threads + 1)]
    ranges = [(a, b) for a, b in pairwise(edges) if a < b]
    return list(_pool().map(lambda each: work(*each), ranges))


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="vqkv")


# A forked child has the pool but none of its threads, and would wait for them for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


@cache
def library() -> ctypes.CDLL:
    """The shared library.

    Raises:
        ImportError: it was not built.
        KernelError: it was built from other sources than lie beside it.
    """
    module = importlib.import_module("vqkv.kernels.native._native")
    assert module.__file__ is not None
    loaded = ctypes.CDLL(module.__file__)
    check_sources(loaded, Path(module.__file__).parent)
    number, pointer, size = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
    loaded.vqkv_best_level.argtypes = []
    loaded.vqkv_best_level.restype = number
    loaded.vqkv_nearest.argtypes = [number, *[pointer] * 2, *[size] * 5, pointer]
    loaded.vqkv_nearest.restype = number
    loaded.vqkv_heads.argtypes = [number, *[pointer] * 3, *[size] * 8, pointer]
    loaded.vqkv_heads.restype = number
    loaded.vqkv_joint.argtypes = [number, *[pointer] * 4, *[size] * 8, pointer]
    loaded.vqkv_joint.restype = number
    loaded.vqkv_beam.argtypes = [number, *[pointer] * 4, *[size] * 8, pointer]
    loaded.vqkv_beam.restype = number
    loaded.vqkv_sums.argtypes = [number, *[pointer] * 3, *[size] * 5, pointer]
    loaded.vqkv_sums.restype = None
    loaded.vqkv_trellis.argtypes = [number, *[pointer] * 4, *[size] * 4, pointer]
    loaded.vqkv_trellis.restype = number
    loaded.vqkv_trellis_decode.argtypes = [
        *(pointer, size),
        *[pointer] * 5,
        *[size] * 5,
        pointer,
    ]
    loaded.vqkv_trellis_decode.restype = number
    loaded.vqkv_accumulate.argtypes = [*[pointer] * 4, *[size] * 5, *[pointer] * 3]
    loaded.vqkv_accumulate.restype = None
    loaded.vqkv_decode.argtypes = [*[pointer] * 2, *[size] * 6, pointer]
    loaded.vqkv_decode.restype = number
    loaded.vqkv_pack.argtypes = [pointer, *[size] * 4, pointer]
    loaded.vqkv_pack.restype = None
    loaded.vqkv_unpack.argtypes = [pointer, *[size] * 5, pointer]
    loaded.vqkv_unpack.restype = None
    loaded.vqkv_attend.argtypes = [number, pointer, size, size]
    loaded.vqkv_attend.restype = number
    loaded.vqkv_rest.argtypes = [number, pointer, size, size]
    loaded.vqkv_rest.restype = number
    return loaded


def check_sources(loaded: ctypes.CDLL, folder: Path) -> None:
    """That a library was built from a folder's C sources; a wheel has none.

    Raises:
        KernelError: it was built from others, and would be called with what it does not know.
    """
    # Hidden files are editors'.
    sources = sorted([*folder.glob("[!.]*.c"), *folder.glob("[!.]*.h")])
    if not sources:
        return
    content = b"".join(path.read_bytes() for path in sources).replace(b"\r\n", b"\n")
    built = ""  # by a version that did not say
    if hasattr(loaded, "vqkv_sources"):
        loaded.vqkv_sources.restype = ctypes.c_char_p
        built = loaded.vqkv_sources().decode()
    if built != hashlib.sha256(content).hexdigest():
        raise KernelError(
            f"{folder}: the C sources have changed since {Path(loaded._name).name} was built; "
            "build it anew by `pip install -e .`, or delete it to run without"
        )
