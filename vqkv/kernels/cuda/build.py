"""Sources to functions on a GPU."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import torch

from vqkv.errors import KernelError

SOURCES = files("vqkv.kernels.cuda")
HEADER = "warp.cuh"


@cache
def compiled(name: str, macros: tuple[tuple[str, int], ...], capability: int) -> bytes:
    """The cubin of a source with its macros, for a GPU of this compute capability.

    Raises:
        KernelError: NVRTC does not compile it; says what NVRTC printed.
    """
    from cuda.bindings import nvrtc

    source, header = (SOURCES.joinpath(file).read_bytes() for file in (name, HEADER))
    error, program = nvrtc.nvrtcCreateProgram(source, name.encode(), 1, [header], [HEADER.encode()])
    _check(error, "create a program")
    options = [f"-arch=sm_{capability}", "-std=c++17", "-diag-suppress=177"]
    options += [f"-D{macro}={int(value)}" for macro, value in macros]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    if int(error):
        raise KernelError(f"NVRTC does not compile {name} {dict(macros)}: {_log(nvrtc, program)}")
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    cubin = bytes(size)
    (error,) = nvrtc.nvrtcGetCUBIN(program, cubin)
    _check(error, "give a cubin")
    nvrtc.nvrtcDestroyProgram(program)
    return cubin


@cache
def function(
    name: str, macros: tuple[tuple[str, int], ...], device: torch.device, shared_bytes: int
) -> Any:
    """A kernel on a GPU, the current one, allowed so much shared memory; compiled once.

    Its source has its name.

    Raises:
        KernelError: it does not compile, or the driver does not take it.
    """
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(device)
    error, module = driver.cuModuleLoadData(compiled(f"{name}.cu", macros, 10 * major + minor))
    _check(error, f"load {name}")
    error, kernel = driver.cuModuleGetFunction(module, name.encode())
    _check(error, f"find {name}")
    limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (error,) = driver.cuFuncSetAttribute(kernel, limit, shared_bytes)
    _check(error, f"give {name} {shared_bytes} bytes of shared memory")
    return kernel


def launch(
    kernel: Any, blocks: int, threads: int, shared_bytes: int, arguments: int, stream: int
) -> None:
    """Start it; `arguments` is the address of an array of pointers to them.

    It may begin while the kernel before it in the stream still runs, see `warp.cuh`.

    Raises:
        KernelError: the driver refuses.
    """
    from cuda.bindings import driver

    early = driver.CUlaunchAttribute()
    early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    early.value.programmaticStreamSerializationAllowed = 1
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes, config.hStream = shared_bytes, stream
    config.attrs, config.numAttrs = [early], 1
    (error,) = driver.cuLaunchKernelEx(config, kernel, arguments, 0)
    _check(error, "launch")


def _log(nvrtc: Any, program: Any) -> str:
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytes(size)
    nvrtc.nvrtcGetProgramLog(program, log)
    return log.decode(errors="replace").strip("\0\n ")


def _check(error: Any, doing: str) -> None:
    if int(error):
        raise KernelError(f"CUDA does not {doing}: {error}")
