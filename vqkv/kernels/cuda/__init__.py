"""Kernels in CUDA C++, compiled by NVRTC when first needed.

The sources go by the names of `warp.cuh` alone; the tests have those names for a CPU.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

from vqkv.kernels.cuda.configs import HOPPER, MOST_SHARED_BYTES


@cache
def installed() -> bool:
    """Whether CUDA's Python bindings can be imported; says nothing of a GPU."""
    return find_spec("cuda") is not None and find_spec("cuda.bindings") is not None


def unavailable_reason(device: torch.device) -> str | None:
    """Why the kernels do not run on a device, or None."""
    if device.type != "cuda":
        return f"runs on cuda, not on {device.type}"
    if not installed():
        return "CUDA's Python bindings are not installed (pip install 'vqkv[gpu]')"
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(device)
        if 10 * gpu.major + gpu.minor < HOPPER:
            return f"needs compute capability 9.0, this GPU has {gpu.major}.{gpu.minor}"
        # Old builds of torch do not say.
        have = getattr(gpu, "shared_memory_per_block_optin", MOST_SHARED_BYTES)
        if have < MOST_SHARED_BYTES:
            return f"needs {MOST_SHARED_BYTES} bytes of shared memory in a block, here are {have}"
    return _no_compiler()


@cache
def _no_compiler() -> str | None:
    from cuda.bindings import nvrtc

    try:
        nvrtc.nvrtcVersion()
    except Exception as error:  # whatever the loader of a missing library raises
        return f"NVRTC, CUDA's compiler, is not there (pip install 'vqkv[gpu]'): {error}"
    return None
