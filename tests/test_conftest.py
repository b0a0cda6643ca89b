"""The suite's own safeguard works, and leaves torch working."""

from __future__ import annotations

import torch


def test_unwritten_memory_is_poison() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(2, dtype=torch.float16)).isnan().all()
    assert torch.zeros(2).new_empty(4, dtype=torch.bfloat16).isnan().all()
    assert (torch.empty(3, dtype=torch.uint8) == 255).all()
    assert torch.empty_strided((2, 2), (1, 2), dtype=torch.int32).min() == 2**31 - 1


def test_device_contexts_still_reach_it() -> None:
    with torch.device("meta"):
        assert torch.empty(3).is_meta
        assert torch.nn.Linear(2, 2).weight.is_meta


def test_modules_still_initialise() -> None:
    assert torch.nn.Linear(4, 4).weight.isfinite().all()
    assert torch.empty(3, requires_grad=True).requires_grad
