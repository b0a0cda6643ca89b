"""The compiled CPU kernels, called through ctypes. Absent where the package was built without C."""

from vqkv.kernels.native.library import (
    Level,
    available,
    forced_level,
    refusal,
    simd_level,
    unavailable_reason,
)
from vqkv.kernels.native.nearest import Statistics, assign_accumulate, nearest

__all__ = [
    "Level",
    "Statistics",
    "assign_accumulate",
    "available",
    "forced_level",
    "nearest",
    "refusal",
    "simd_level",
    "unavailable_reason",
]
