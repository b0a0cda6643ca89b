"""The contract of `attend_codes` as the flat arguments that `torch.library` ops take."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vqkv.kernels.attend.codes import AttendLayout, Coded, Partial, in_coded_order
from vqkv.layouts import Layout

#: Output, log-sum-exp, and key means (empty unless asked for).
Found = tuple[Tensor, Tensor, Tensor]


def through(op: Callable[..., Found], query: Tensor, coded: Coded) -> Partial:
    """What an op finds for queries and coded tokens."""
    turns = (None, None, None) if coded.turns is None else coded.turns
    output, lse, key_mean = op(
        in_coded_order(query, coded.order),
        *coded.keys,
        *coded.values,
        coded.start,
        coded.stop,
        coded.pages,
        *turns,
        coded.key_sums,
    )
    return Partial(output, lse, key_mean if coded.key_sums else None)


def fake(query: Tensor, *others: Tensor | bool | None) -> Found:
    """Shapes and types that such an op gives, for `register_fake`. `key_sums` come last."""
    key_sums = others[-1]
    output = query.new_empty(query.shape, dtype=torch.float32)
    return (
        output,
        output.new_empty(query.shape[:3]),
        output.new_empty(query.shape if key_sums else 0),
    )


def first_odd(layout: AttendLayout, odd_shape: Callable[[Layout], str | None]) -> str | None:
    """Which stream a kernel does not read and why, or None."""
    odd = {name: odd_shape(stream) for name, stream in layout._asdict().items()}
    return next((f"{name}: {reason}" for name, reason in odd.items() if reason), None)
