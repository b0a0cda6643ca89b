"""What a kernel must know about stored codes, as small frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

#: Tokens of a page. Pages start at multiples of it, counted from a row's first token.
PAGE_TOKENS = 64

Stream = Literal["keys", "values"]
Rope = Literal["pre", "post"]
Sharing = Literal["group", "head", "layer", "subspace", "model"]

#: Scopes of which all layers read the same codebooks.
ACROSS_LAYERS: tuple[Sharing, ...] = ("subspace", "model")


def coded_tokens(tokens: int, window: int) -> int:
    """How many of a row's `tokens` tokens lie in pages: whole pages that the window left behind."""
    return max(0, tokens - window) // PAGE_TOKENS * PAGE_TOKENS


@dataclass(frozen=True)
class Segment:
    """A run of channels coded alike.

    `units` are the heads, or 1 where a code spans heads. A unit has `groups` subvectors of `dim`
    channels, each stored as `stages` codes of `code_bits` bits from one of `books` codebooks.
    Codes of one unit and token are packed together and padded to whole bytes.
    """

    units: int
    groups: int
    dim: int
    stages: int
    code_bits: int
    books: int

    @property
    def subvectors(self) -> int:
        """M, over all units."""
        return self.units * self.groups

    @property
    def codewords(self) -> int:
        """K of one codebook."""
        return 1 << self.code_bits

    @property
    def codes_per_unit(self) -> int:
        """Codes of one token in one unit."""
        return self.groups * self.stages

    @property
    def bytes_per_unit(self) -> int:
        """Stored bytes of one token in one unit."""
        return -(-self.codes_per_unit * self.code_bits // 8)


@dataclass(frozen=True)
class SideField:
    """Scalars stored with each token beside its codes, such as a scale per head."""

    name: str
    count: int
    bits: int = 16


@dataclass(frozen=True)
class Layout:
    """How one stream's tokens are stored.

    Attributes:
        heads: H.
        head_dim: D.
        segments: in channel order.
        side: scalars stored per token.
        rope: for keys, whether what is coded is the key before or after rotation.
        pairs_whole: every RoPE pair lies inside one subvector.
        head_local: codes and transforms never mix heads.
        sharing: which subvectors read the same codebook.
        sources: (stream, compressed layers back) of what the tokens are predicted from.
        token_group: tokens in a row that are only coded and decoded together, a part of a page.
        commuting: a head's key is its token's scale, if there is one, times a sum of two units a
            stage that commute with RoPE, as CommVQ's do.
    """

    heads: int
    head_dim: int
    segments: tuple[Segment, ...]
    side: tuple[SideField, ...] = ()
    rope: Rope | None = None
    pairs_whole: bool = False
    head_local: bool = True
    sharing: Sharing = "group"
    sources: tuple[tuple[Stream, int], ...] = ()
    token_group: int = 1
    commuting: bool = False

    def __hash__(self) -> int:
        """By what tells most layouts apart: kernels are looked up by layout in every layer."""
        return hash((self.heads, self.head_dim, self.segments[:1]))

    @classmethod
    def of_codebook(
        cls, books: int, stages: int, codewords: int, dim: int, units: int = 1
    ) -> Layout:
        """The layout that a bare codebook `[M, S, K, d]` of U units implies, for work on vectors
        alone."""
        bits = max(codewords - 1, 0).bit_length()
        groups = books // units
        return cls(units, groups * dim, (Segment(units, groups, dim, stages, bits, books),))

    @property
    def units(self) -> int:
        """Separately packed parts of a token: heads, or 1 where codes span heads."""
        return self.segments[0].units

    @property
    def bytes_per_unit(self) -> int:
        """Code bytes of one token in one unit."""
        return sum(segment.bytes_per_unit for segment in self.segments)

    @property
    def side_count(self) -> int:
        """Side scalars of one token."""
        return sum(field.count for field in self.side)

    @property
    def bytes_per_token(self) -> int:
        """All bytes stored per token: packed codes with padding, and side scalars."""
        side_bits = sum(field.count * field.bits for field in self.side)
        return self.units * self.bytes_per_unit + -(-side_bits // 8)

    @property
    def bits_per_value(self) -> float:
        """Stored bits over cached scalars."""
        return float(Fraction(8 * self.bytes_per_token, self.heads * self.head_dim))
