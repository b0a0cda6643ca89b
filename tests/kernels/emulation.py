"""CUDA kernels as libraries for a CPU, see `emulated/warp.cuh`."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from vqkv.kernels.cuda.attend_ops import Argument, pointers
from vqkv.kernels.cuda.configs import Variant

HERE = Path(__file__).parent / "emulated"
SOURCES = Path(__file__).parents[2] / "vqkv" / "kernels" / "cuda"
COMPILER = shutil.which("g++") or shutil.which("clang++")


class Emulator:
    """Compiles variants into a folder and runs them.

    Attributes:
        wavefronts: of shared memory that look-ups of the last launch of `attend` took, per 32 of
            them; of keys and of values.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._libraries: dict[Variant, ctypes.CDLL] = {}
        self.wavefronts = (0.0, 0.0)

    def launch(self, variant: Variant, blocks: int, arguments: Sequence[Argument]) -> None:
        """As `attend_ops.on_gpu`."""
        library = self._library(variant)
        array, _held = pointers(arguments)
        library.run(blocks, variant.threads, variant.shared_bytes, array)
        if variant.name != "attend":
            return
        keys, values = (32 * library.wavefronts(i) / max(1, library.lookups(i)) for i in range(2))
        self.wavefronts = keys, values

    def _library(self, variant: Variant) -> ctypes.CDLL:
        if variant not in self._libraries:
            path = self._folder / f"{variant.name}-{len(self._libraries)}.so"
            flags = ["-O1", "-g", "-fPIC", "-shared", "-std=c++17", f"-I{HERE}", f"-I{SOURCES}"]
            flags += ["-Wall", "-Wno-unknown-pragmas", "-Wno-unused-variable", "-Werror"]
            macros = [f"-D{name}={int(value)}" for name, value in variant.macros()]
            command = [str(COMPILER), *flags, *macros, str(HERE / f"{variant.name}.cpp"), "-o"]
            subprocess.run([*command, str(path)], check=True)
            library = ctypes.CDLL(str(path))
            if variant.name == "attend":
                library.lookups.restype = library.wavefronts.restype = ctypes.c_longlong
            self._libraries[variant] = library
        return self._libraries[variant]
