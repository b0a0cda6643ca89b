"""Launch kernels for a GPU that is not there: everything but the run, as JSON of what was compiled.

Triton specializes a launch by its arguments (types, alignment, ones), so a kernel that compiles in
`offline.py` may still fail to in a launch.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"

import json
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.gpu.exact import exact
from benchmarks.gpu.gathers import gathers
from benchmarks.gpu.sizes import TOY
from tests.kernels import test_attend_rest
from tests.kernels.coded_cases import Case, problem
from vqkv.kernels.attend import codes_triton as attend
from vqkv.kernels.attend import rest_triton as attend_rest
from vqkv.kernels.decode import codes_triton as decode_pages
from vqkv.kernels.decode import triton as decode
from vqkv.kernels.encode import heads_triton as encode_heads
from vqkv.kernels.encode import joint_triton as encode_joint
from vqkv.kernels.encode import pair_triton as encode_pair
from vqkv.kernels.encode import triton as encode
from vqkv.kernels.encode.joint import coupling

CASES = (
    Case(),
    Case(head_dim=128, heads=1, group=4, lengths=(300, 70), paged=True, key_sums=True),
    Case(head_dim=128, dim=8, rope=False, lengths=(64, 1, 130)),
    Case(head_dim=128, lengths=(1000,)),
    Case(head_dim=80, dim=8, group=1, heads=1, rows=16),
)


class NoGPU:
    """What Triton asks a driver before it compiles."""

    def get_current_device(self) -> int:
        """The first."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """A Hopper."""
        return GPUTarget("cuda", 90, 32)


def launches() -> list[str]:
    """Names of the kernels that would have been launched."""
    names: list[str] = []

    def launcher(kernel: Any, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            kernel.run(*args, grid=grid, warmup=True, **kwargs)
            names.append(kernel.__name__)

        return launch

    driver.set_active(NoGPU())
    JITFunction.__getitem__ = launcher
    for case in CASES:
        query, coded = problem(case)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            attend.attend_codes(query.to(dtype), coded)
        for dtype in (torch.float32, torch.bfloat16):
            decode_pages.decode_codes(coded.keys, range(64, 70), coded.turns, coded.pages, dtype)
    for rest in test_attend_rest.CASES + test_attend_rest.HALVES:
        attend_rest.attend_rest(*test_attend_rest.problem(rest))
    x, books = torch.randn(2000, 8, 4), torch.randn(8, 2, 256, 4)
    encode.encode(x, books.half())
    encode.encode(x[:1], books[:, :1])
    encode_pair.encode_pair(x, books, x[:5].half(), books)
    coupled = coupling(torch.zeros(2, 16, 16).half(), 4)
    encode_joint.encode_joint(x, books[:, :1].half(), coupled, 2, 1)
    encode_heads.encode_heads(x, books[:, :1], torch.zeros(1, 2, 16, 2, 16).half(), 2)
    decode.decode(torch.zeros(5, 8, 2, dtype=torch.int32), books)
    states = torch.zeros(1, 1, 70, 128).half()
    exact(torch.zeros(1, 4, 1, 128).half(), states, states)
    gathers(TOY)
    return names


if __name__ == "__main__":
    print(json.dumps(launches()))
