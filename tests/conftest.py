"""What every test gets: memory that nobody wrote is poison, not zeros by luck."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import pytest
import torch
from torch.utils._device import _device_constructors

from vqkv.geometry import Geometry, RopeForm

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what `torch.empty` and its like return with NaN, or the type's largest integer."""
    # Torch keeps a list of the functions that `with torch.device(...)` acts on, made at first use.
    # It has to hold the real ones, which ours call.
    _device_constructors()
    with pytest.MonkeyPatch.context() as patch:
        for owner, names in (
            (torch, ("empty", "empty_like", "empty_strided", "empty_permuted")),
            (torch.Tensor, ("new_empty", "new_empty_strided")),
        ):
            for name in names:
                patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(allocate)
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_meta or not tensor.numel():
            return tensor
        with torch.no_grad():
            if tensor.dtype in _FLOATS:
                tensor.fill_(float("nan"))
            elif tensor.dtype in _INTEGERS:
                tensor.fill_(torch.iinfo(tensor.dtype).max)
        return tensor

    return poisoned


@pytest.fixture
def geometry() -> Geometry:
    """Two layers of two KV heads of 16 channels, half-split RoPE."""
    return make_geometry()


def make_geometry(**changes: Any) -> Geometry:
    """The geometry of `geometry`, with some fields changed."""
    return Geometry(
        **{
            "model_type": "llama",
            "layers": 2,
            "compressed": (0, 1),
            "kv_heads": 2,
            "query_heads": 4,
            "head_dim": 16,
            "qk_norm": False,
            "rope": RopeForm("default", 10000.0, 16, "half"),
            **changes,
        }
    )
