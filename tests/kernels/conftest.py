"""What several tests of kernels go through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from vqkv.errors import KernelError
from vqkv.kernels import native


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def level(request: pytest.FixtureRequest) -> Iterator[native.Level]:
    """Each SIMD level that this CPU has; coding needs no bfloat16."""
    with ExitStack() as stack:
        try:
            stack.enter_context(native.forced_level(request.param))
        except KernelError as error:
            pytest.skip(str(error))
        yield request.param
