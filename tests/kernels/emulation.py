"""`attend.cu` as a library for a CPU, see `emulated/warp.cuh`."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vqkv.kernels.attend.codes_op import Found
from vqkv.kernels.cuda.attend_ops import Argument, pointers
from vqkv.kernels.cuda.configs import AttendVariant

HERE = Path(__file__).parent / "emulated"
SOURCES = Path(__file__).parents[2] / "vqkv" / "kernels" / "cuda"
COMPILER = shutil.which("g++") or shutil.which("clang++")


class Emulator:
    """Compiles variants into a folder and runs them.

    Attributes:
        wavefronts: of shared memory that the last launch's look-ups took, per lane and look-up.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._libraries: dict[AttendVariant, ctypes.CDLL] = {}
        self.wavefronts = 0.0

    def launch(self, variant: AttendVariant, blocks: int, arguments: Sequence[Argument]) -> None:
        """As `attend_ops.on_gpu`."""
        library = self._library(variant)
        array, _held = pointers(arguments)
        library.run(blocks, variant.threads, variant.shared_bytes, array)
        self.wavefronts = library.wavefronts() / max(1, library.lookups())

    def _library(self, variant: AttendVariant) -> ctypes.CDLL:
        if variant not in self._libraries:
            path = self._folder / f"attend-{len(self._libraries)}.so"
            flags = ["-O1", "-g", "-fPIC", "-shared", "-std=c++17", f"-I{HERE}", f"-I{SOURCES}"]
            flags += ["-Wall", "-Wno-unknown-pragmas", "-Wno-unused-variable", "-Werror"]
            macros = [f"-D{name}={int(value)}" for name, value in variant.macros()]
            command = [str(COMPILER), *flags, *macros, str(HERE / "attend.cpp"), "-o", str(path)]
            subprocess.run(command, check=True)
            library = ctypes.CDLL(str(path))
            library.lookups.restype = library.wavefronts.restype = ctypes.c_longlong
            self._libraries[variant] = library
        return self._libraries[variant]


def merge(parts: Tensor, lses: Tensor, means: Tensor) -> Found:
    """As `merge_splits`, in torch."""
    lse = lses.logsumexp(0)
    weights = torch.exp(lses - lse).nan_to_num(0.0).unsqueeze(-1)  # no tokens: −inf − −inf
    return (parts * weights).sum(0), lse, (means * weights).sum(0)
