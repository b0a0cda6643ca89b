"""Kernels: one folder per operation, `naive.py` in each the truth that the others must equal."""

from vqkv.kernels.select import KERNELS, Kernel, Selection, recording, select, using

__all__ = ["KERNELS", "Kernel", "Selection", "recording", "select", "using"]
