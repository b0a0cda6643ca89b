"""What follows attention on codes, by the compiled kernel."""

from __future__ import annotations

import ctypes

import torch

from vqkv.errors import KernelError
from vqkv.kernels.attend.codes import Partial
from vqkv.kernels.attend.rest import Rest, state_type
from vqkv.kernels.native.library import address, in_ranges, level_number, library

#: Of exact states, and `enum type` of rest.h.
TYPES = {torch.float32: 0, torch.bfloat16: 1}


class _Run(ctypes.Structure):
    """`struct exact` of rest.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *((f"key_{name}_stride", ctypes.c_int64) for name in ("row", "head", "token")),
        *((f"value_{name}_stride", ctypes.c_int64) for name in ("row", "head", "token")),
        ("tokens", ctypes.c_int64),
    )

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor) -> _Run:
        """Of tensors that outlive it."""
        key_strides, value_strides = keys.stride()[:3], values.stride()[:3]
        return cls(keys.data_ptr(), values.data_ptr(), *key_strides, *value_strides, keys.shape[2])


class _Rest(ctypes.Structure):
    """`struct rest` of rest.h."""

    _fields_ = (
        ("runs", _Run * 2),
        *((name, ctypes.c_int64) for name in ("type", "batch", "heads", "rows", "head_dim")),
        *(
            (name, ctypes.c_void_p)
            for name in ("query", "means", "lse", "key_means", "map", "bias", "hidden", "null")
        ),
        ("output", ctypes.c_void_p),
    )


def attend_rest(query: torch.Tensor, partial: Partial, rest: Rest) -> torch.Tensor:
    """Attention `[B, Q, t, D]` over a layer's coded and exact tokens, all on the CPU.

    Raises:
        KernelError: there is no memory for its scores.
    """
    batch, queries, length, head_dim = query.shape
    heads = len(rest.output_map)
    q, means, lse, key_means, output_map, bias = map(
        _floats, (query, *partial, rest.output_map, rest.output_bias)
    )
    dtype = state_type(rest)
    states = [_side_by_side(each, dtype) for each in (*rest.sinks, *rest.tail)]
    runs = (_Run * 2)(_Run.of(*states[:2]), _Run.of(*states[2:]))
    hidden = rest.hidden
    if hidden is not None:
        hidden = hidden.expand(batch, queries, length, -1).contiguous()
    null = rest.null_by_row(length)
    output = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    task = _Rest(
        runs,
        TYPES[dtype],
        *(batch, heads, queries // heads * length, head_dim),
        *map(address, (q, means, lse, key_means, output_map, bias, hidden, null, output)),
    )

    def run(begin: int, end: int) -> int:
        failure: int = library().vqkv_rest(level_number(), ctypes.byref(task), begin, end)
        return failure

    # A head takes so little in a decoding step that a thread has to have several.
    if any(in_ranges(batch * heads, 4, run)):
        raise KernelError("no memory for scores of exact tokens")
    return output


# A decoding step comes by once a layer, so torch is not asked to convert what needs no conversion.


def _floats(tensor: torch.Tensor | None) -> torch.Tensor | None:
    if tensor is None or (tensor.dtype is torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.float().contiguous()


def _side_by_side(states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    states = states if states.dtype is dtype else states.to(dtype)
    return states if states.stride(3) == 1 else states.contiguous()
