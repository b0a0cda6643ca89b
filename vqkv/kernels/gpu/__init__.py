"""GPU kernels in Triton: what runs on the device, and the custom ops that launch it.

Triton is imported by the modules of this package and by nobody else, and they are imported when a
kernel first runs: without Triton the package works, on torch alone.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch


@cache
def installed() -> bool:
    """Whether Triton can be imported; says nothing of a GPU."""
    return find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU, as `TRITON_INTERPRET=1` asks before import."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable_reason(device: torch.device) -> str | None:
    """Why Triton kernels do not run on a device, or None."""
    if not installed():
        return "Triton is not installed (pip install 'vqkv[gpu]')"
    if device.type == "cuda" or (device.type == "cpu" and interpreting()):
        return None
    return f"runs on cuda, not on {device.type}; TRITON_INTERPRET=1 interprets it on cpu"
