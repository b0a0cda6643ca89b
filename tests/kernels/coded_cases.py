"""Random coded tokens to attend on, of awkward sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vqkv.kernels.attend.codes import AttendLayout, Coded, Plane, Turns
from vqkv.layouts import PAGE_TOKENS, Layout, Segment


@dataclass(frozen=True)
class Case:
    """Sizes of one problem; `lengths` are the rows' coded tokens."""

    heads: int = 2
    group: int = 3
    head_dim: int = 64
    dim: int = 4
    stages: int = 1
    rows: int = 1
    lengths: tuple[int, ...] = (70,)
    sinks: int = 0
    rope: bool = True
    key_sums: bool = False
    paged: bool = False
    size: int = 256
    value_dim: int | None = None  # as of keys
    value_stages: int | None = None

    def segment(self, dim: int, stages: int) -> Segment:
        """Of a stream of such subvectors."""
        groups = self.head_dim // dim
        return Segment(self.heads, groups, dim, stages, 8, self.heads * groups)

    @property
    def layout(self) -> AttendLayout:
        """Of both streams."""
        keys = Layout(
            self.heads,
            self.head_dim,
            (self.segment(self.dim, self.stages),),
            rope="pre" if self.rope else "post",
            pairs_whole=self.rope,
        )
        sources = (("keys", 0),) if self.key_sums else ()
        return AttendLayout(
            keys,
            Layout(
                self.heads,
                self.head_dim,
                (self.segment(self.value_dim or self.dim, self.value_stages or self.stages),),
                sources=sources,  # type: ignore[arg-type]
            ),
        )


def problem(case: Case, seed: int = 0) -> tuple[torch.Tensor, Coded]:
    """Queries `[B, Q, t, D]` and coded tokens."""
    generator = torch.Generator().manual_seed(seed)
    batch, pages = len(case.lengths), -(-max(*case.lengths, 1) // PAGE_TOKENS)
    query = torch.randn(
        batch, case.heads * case.group, case.rows, case.head_dim, generator=generator
    )
    table = torch.randperm(batch * pages, generator=generator).view(batch, pages).int()
    shapes = (
        (case.dim, case.stages),
        (case.value_dim or case.dim, case.value_stages or case.stages),
    )
    keys, values = (_plane(case, *shape, batch, pages, table, generator) for shape in shapes)
    stop = torch.tensor(case.lengths, dtype=torch.int32)
    coded = Coded(
        keys,
        values,
        start=stop.clamp(max=case.sinks).int(),
        stop=stop,
        turns=_turns(case, batch, pages, generator) if case.rope else None,
        key_sums=case.key_sums,
        pages=table if case.paged else None,
    )
    return query * case.head_dim**-0.5 * 3, coded


def with_codes(coded: Coded, laid: Callable[[torch.Tensor], torch.Tensor]) -> Coded:
    """With the codes of both streams laid out in another way."""
    keys, values = (plane._replace(codes=laid(plane.codes)) for plane in (coded.keys, coded.values))
    return coded._replace(keys=keys, values=values)


def askew(codes: torch.Tensor) -> torch.Tensor:
    """67 tokens a head, not whole pages, a token's codes a byte further off than they are long."""
    wide = torch.empty(*codes.shape[:2], 67, codes.shape[3] + 1, dtype=torch.uint8)
    wide[..., 1:] = codes[:, :, :67]
    return wide[..., 1:]


def by_token(codes: torch.Tensor) -> torch.Tensor:
    """A head's tokens between those of others, as `[B, T, H, M]` lies in memory."""
    return codes.transpose(1, 2).contiguous().transpose(1, 2)


def _plane(
    case: Case,
    dim: int,
    stages: int,
    batch: int,
    pages: int,
    table: torch.Tensor,
    generator: torch.Generator,
) -> Plane:
    groups = case.head_dim // dim
    words = torch.randn(case.heads, groups, stages, case.size, dim, generator=generator)
    shape = (batch * pages, case.heads, PAGE_TOKENS, groups * stages)
    codes = torch.randint(case.size, shape, generator=generator).to(torch.uint8)
    if not case.paged:
        codes = codes.view(batch, pages, *shape[1:]).transpose(1, 2).flatten(2, 3).contiguous()
    return Plane(codes, words.half())


def _turns(case: Case, batch: int, pages: int, generator: torch.Generator) -> Turns:
    half = case.head_dim // 2
    frequency = 10000.0 ** -(torch.arange(half) / half)
    first = torch.randint(50, (batch, 1), generator=generator)
    starts = first + PAGE_TOKENS * torch.arange(pages)
    page = torch.polar(torch.ones(batch, pages, half), starts.unsqueeze(-1) * frequency)
    scale = torch.full((PAGE_TOKENS, half), 1.1)  # as YaRN scales
    offset = torch.polar(scale, torch.arange(PAGE_TOKENS)[:, None] * frequency)
    pairs = torch.stack([torch.randperm(half, generator=generator) for _ in range(case.heads)])
    return Turns(torch.view_as_real(page), torch.view_as_real(offset), pairs.int())
