"""What this GPU reaches on a copy and on a matrix product, now."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.timing import microseconds


def ceilings(sizes: Sizes) -> dict[str, Any]:
    """GB/s of a copy, bytes read and written both counted, and TFLOP/s of an fp16 product."""
    source = torch.randn(sizes.copy_bytes // 4, device=sizes.device)
    target = torch.empty_like(source)
    # By a kernel: in a graph, `copy_` is left to an engine that is slower.
    copy = microseconds([partial(torch.neg, source, out=target)])
    left, right = (
        torch.randn(sizes.matrix, sizes.matrix, device=sizes.device).half() for _ in range(2)
    )
    product = microseconds([partial(torch.mm, left, right)])
    return {
        "copy_us": copy,
        "copy_gb_per_s": copy and 2e-3 * sizes.copy_bytes / copy,
        "product_us": product,
        "product_tflop_per_s": product and 2e-6 * sizes.matrix**3 / product,
    }
