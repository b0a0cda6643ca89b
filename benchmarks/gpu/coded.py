"""Random coded tokens of a model's shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.gpu.sizes import Sizes
from vqkv.kernels.attend.codes import AttendLayout, Coded, Plane, Turns
from vqkv.layouts import PAGE_TOKENS, Layout, Segment

CODEWORDS = 256


@dataclass(frozen=True)
class Scheme:
    """How both streams are coded."""

    dim: int
    stages: int = 1
    rope: bool = False
    key_sums: bool = False
    paged: bool = False
    skewed: bool = False

    @property
    def name(self) -> str:
        """As figures call it."""
        words = [f"d{self.dim}"]
        words += [f"x{self.stages}"] if self.stages > 1 else []
        marks = ("rope", "key_sums", "paged", "skewed")
        return "-".join(words + [mark.replace("_", "-") for mark in marks if getattr(self, mark)])

    def layout(self, sizes: Sizes) -> AttendLayout:
        """Of both streams."""
        groups = sizes.head_dim // self.dim
        segment = Segment(sizes.heads, groups, self.dim, self.stages, 8, sizes.heads * groups)
        shape = (sizes.heads, sizes.head_dim, (segment,))
        keys = Layout(*shape, rope="pre" if self.rope else "post", pairs_whole=self.rope)
        return AttendLayout(keys, Layout(*shape, sources=(("keys", 0),) if self.key_sums else ()))


def coded(sizes: Sizes, scheme: Scheme, context: int, batch: int) -> Coded:
    """Coded tokens of a batch of equal contexts, without sinks."""
    pages = -(-context // PAGE_TOKENS)
    order = torch.randperm(batch * pages, device=sizes.device).view(batch, pages).int()
    full = torch.full((batch,), context, dtype=torch.int32, device=sizes.device)
    return Coded(
        _plane(sizes, scheme, pages, batch),
        _plane(sizes, scheme, pages, batch),
        torch.zeros_like(full),
        full,
        _turns(sizes, pages) if scheme.rope else None,
        scheme.key_sums,
        order if scheme.paged else None,
    )


def code_bytes(of: Coded) -> int:
    """Bytes of codes that attention has to read."""
    return of.keys.codes.numel() + of.values.codes.numel()


def _plane(sizes: Sizes, scheme: Scheme, pages: int, batch: int) -> Plane:
    groups = sizes.head_dim // scheme.dim
    shape = (sizes.heads, groups, scheme.stages, CODEWORDS, scheme.dim)
    width = groups * scheme.stages
    tokens = (batch * pages, sizes.heads, PAGE_TOKENS, width)
    if not scheme.paged:
        tokens = (batch, sizes.heads, pages * PAGE_TOKENS, width)
    codes = torch.randint(CODEWORDS, tokens, dtype=torch.uint8, device=sizes.device)
    if scheme.skewed:  # the least code of four: a seventh of the codewords gets half of the codes
        for _ in range(3):
            codes = torch.minimum(codes, torch.randint_like(codes, CODEWORDS))
    return Plane(codes, torch.randn(shape, device=sizes.device).half())


def _turns(sizes: Sizes, pages: int) -> Turns:
    half = sizes.head_dim // 2
    frequency = 500000.0 ** -(torch.arange(half, dtype=torch.float64) / half)

    def turns(positions: torch.Tensor) -> torch.Tensor:
        angle = positions[:, None] * frequency
        both = torch.stack([angle.cos(), angle.sin()], -1)
        return both.to(sizes.device, torch.float32)

    pairs = torch.stack([torch.randperm(half) for _ in range(sizes.heads)])
    return Turns(
        turns(PAGE_TOKENS * torch.arange(pages))[None],
        turns(torch.arange(PAGE_TOKENS)),
        pairs.to(sizes.device, torch.int32),
    )
