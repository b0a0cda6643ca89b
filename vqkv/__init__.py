"""vqkv: vector-quantized KV caches for language models.

The public names are imported when first used, so that `import vqkv` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vqkv.version import __version__

if TYPE_CHECKING:
    from vqkv.cache import BeforeUseCache, VQCache, attach
    from vqkv.calibration import calibrate
    from vqkv.compressor import KVCompressor
    from vqkv.evaluation import evaluate
    from vqkv.geometry import Geometry
    from vqkv.models import load_model
    from vqkv.scheme import Scheme
    from vqkv.scheme_files import load_scheme

_HOMES = {
    "BeforeUseCache": "vqkv.cache",
    "Geometry": "vqkv.geometry",
    "KVCompressor": "vqkv.compressor",
    "Scheme": "vqkv.scheme",
    "VQCache": "vqkv.cache",
    "attach": "vqkv.cache",
    "calibrate": "vqkv.calibration",
    "evaluate": "vqkv.evaluation",
    "load_model": "vqkv.models",
    "load_scheme": "vqkv.scheme_files",
}

__all__ = [
    "BeforeUseCache",
    "Geometry",
    "KVCompressor",
    "Scheme",
    "VQCache",
    "__version__",
    "attach",
    "calibrate",
    "evaluate",
    "load_model",
    "load_scheme",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vqkv' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
