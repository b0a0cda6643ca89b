"""Where a decoding step's time goes: products with weights, attention with its cache, the rest."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from vqkv.attention import attention_modules


class Shares:
    """Seconds spent while a `measuring` block was open.

    Attributes:
        products: in linear layers.
        attention: in attention modules, without their linear layers: RoPE, cache, attention.
        total: in the block.
    """

    def __init__(self) -> None:
        self.products = self.attention = self.total = 0.0

    def milliseconds(self, steps: int) -> dict[str, float]:
        """Of one step each, of so many that were taken."""
        rest = self.total - self.products - self.attention
        spent = {"products": self.products, "attention": self.attention, "rest": rest}
        return {f"{name}_ms": 1000 * seconds / steps for name, seconds in spent.items()}


@contextmanager
def measuring(model: Any) -> Iterator[Shares]:
    """Time the parts of a model's forwards within a block, on a CPU: calls wait for results."""
    shares = Shares()
    linear = {module for module in model.modules() if isinstance(module, nn.Linear)}
    attention = set(attention_modules(model).values())
    inside = {child for module in attention for child in module.modules()} & linear
    clock = time.perf_counter
    began: dict[nn.Module, float] = {}

    def start(module: nn.Module, *_: Any) -> None:
        began[module] = clock()

    def stop(module: nn.Module, *_: Any) -> None:
        spent = clock() - began.pop(module)
        if module in attention:
            shares.attention += spent
        else:
            shares.products += spent
        if module in inside:
            shares.attention -= spent

    hooks = [module.register_forward_pre_hook(start) for module in linear | attention]
    hooks += [module.register_forward_hook(stop) for module in linear | attention]
    first = clock()
    try:
        yield shares
    finally:
        shares.total = clock() - first
        for hook in hooks:
            hook.remove()
