"""Kernels in CUDA C++, compiled by NVRTC when first needed.

The sources go by the names of `warp.cuh` alone; the tests have those names for a CPU.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

from vqkv.kernels.cuda.configs import HOPPER


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
        major, minor = torch.cuda.get_device_capability()
        if 10 * major + minor < HOPPER:
            return f"needs compute capability 9.0, this GPU has {major}.{minor}"
    return None
